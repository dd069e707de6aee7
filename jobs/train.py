"""Train on the cluster that runs this: `ray job submit --working-dir . -- python jobs/train.py RECIPE path=value ...`.

The arguments are those of `raydiff train`. With --resume NAME, a run that stopped goes on after its newest checkpoint.
"""

import sys

from raydiff.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
