"""Softmax attention with its tangent and its backward pass, against everybody else's, in one run.

    python benchmarks/bench_attention.py [--device cpu|cuda] [--sizes SIZE,...] [--json FILE]

Peers (attention_peers.py): the formula that stores N x N scores, in forward mode where a tangent is
asked; the backends of scaled_dot_product_attention; flash-attn and jvp-flash-attention where they
are installed and there is a GPU. Sizes are those of the models, and n64-d64 to n16384-d128; a CPU
measures 16384 tokens only when `--sizes` names them.

Bound by matrix products: two forward, five backward, six for output and tangent together, counted
without padding.
"""

import sys

import attention_peers

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["attention", *sys.argv[1:]], rivals=attention_peers.rivals))
