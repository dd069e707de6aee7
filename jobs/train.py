"""Train on the cluster that runs this: `ray job submit --working-dir . -- python jobs/train.py RECIPE path=value ...`.

With --resume NAME, a run that stopped goes on after its newest checkpoint.
"""

import argparse
import sys

import raydiff
from raydiff import credentials


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="path=value")
    parser.add_argument("--resume", metavar="NAME", help="name or folder of a started run")
    try:
        credentials.refuse_arguments(sys.argv[1:])
        arguments = parser.parse_args()
        raydiff.train(raydiff.load(arguments.recipe, arguments.overrides), resume=arguments.resume)
    except (ValueError, FloatingPointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
