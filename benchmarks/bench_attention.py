"""Softmax attention and its tangent, against the formula that stores the N x N matrix.

    python benchmarks/bench_attention.py [--device cpu|cuda] [--sizes SIZE,...] [--json FILE]

Bound by matrix products: two forward, five backward, seven for output and tangent together. On a
GPU with long sequences and other head widths too, where the formula may find no memory (a note says
so then).
"""

import sys

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["attention", *sys.argv[1:]]))
