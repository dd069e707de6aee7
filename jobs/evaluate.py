"""Judge an adapter on a cluster's node, with the options of `raydiff evaluate`:

ray job submit --entrypoint-num-gpus 1 --working-dir . -- python jobs/evaluate.py RECIPE --adapter DIR --to FOLDER
"""

import sys

from raydiff import cli

if __name__ == "__main__":
    cli.main(["evaluate", *sys.argv[1:]])
