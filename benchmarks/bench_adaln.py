"""Adaptive layer norm, alone and behind the gated residual (gated_adaln), against PyTorch.

    python benchmarks/bench_adaln.py [--device cpu|cuda] [--sizes SIZE,...] [--json FILE]

Bound by memory. Shift, scale and gate are views into one tensor, as the blocks make them.
"""

import sys

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["adaln", *sys.argv[1:]]))
