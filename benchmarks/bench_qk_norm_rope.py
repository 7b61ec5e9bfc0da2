"""Split, layer norm and rotation of the packed q, k and v, against PyTorch.

    python benchmarks/bench_qk_norm_rope.py [--device cpu|cuda] [--sizes SIZE,...] [--json FILE]

Bound by memory: qkv once in, once out. The backward pass has no use for v itself.
"""

import sys

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["qk_norm_rope", *sys.argv[1:]]))
