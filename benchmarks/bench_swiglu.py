"""The gate of every MLP, against PyTorch.

    python benchmarks/bench_swiglu.py [--device cpu|cuda] [--sizes SIZE,...] [--json FILE]

Bound by memory: two tensors in, one out.
"""

import sys

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["swiglu", *sys.argv[1:]]))
