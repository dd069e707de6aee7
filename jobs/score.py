"""Score a dataset of pictures, on the cluster that runs this:

    ray job submit --working-dir . -- python jobs/score.py DATASET ...

The arguments are those of `raydiff score`; the same job goes on with one that was interrupted.
"""

import sys

from raydiff.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
