"""x_t and v_t in one pass, against four products and two sums in PyTorch.

    python benchmarks/bench_interpolate.py [--device cpu|cuda] [--sizes SIZE,...] [--json FILE]

Bound by memory: two tensors in, two out. The batches are those of the objective.
"""

import sys

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["interpolate", *sys.argv[1:]]))
