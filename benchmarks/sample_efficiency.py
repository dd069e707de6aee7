"""Compare the methods' sample efficiency on the embedded model: `raydiff bench`, with its options.

python benchmarks/sample_efficiency.py --quick         # a rehearsal of minutes
python benchmarks/sample_efficiency.py --to bench      # all of it; the same command goes on after an interruption
"""

import sys

from raydiff.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
