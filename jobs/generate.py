"""Many pictures, on the cluster that runs this:

    ray job submit --working-dir . -- python jobs/generate.py --to s3://bucket/x.parquet ...

The arguments are those of `raydiff generate`; the same job goes on with one that was interrupted.
"""

import sys

from raydiff.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
