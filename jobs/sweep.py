"""Run a sweep on the cluster that runs this:

    ray job submit --working-dir . -- python jobs/sweep.py jobs/sweeps/emoji_k.toml ...

The arguments are those of `raydiff sweep`; with --resume NAME, what failed or was cut off goes on.
"""

import sys

from raydiff.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
