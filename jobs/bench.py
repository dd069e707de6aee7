"""Compare the methods' sample efficiency on a cluster's node, with the options of `raydiff bench`:

ray job submit --entrypoint-num-cpus 2 --working-dir . -- python jobs/bench.py --to /shared/bench
"""

import sys

from raydiff.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
