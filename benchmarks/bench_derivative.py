"""The exact time derivative, as an operator and in the training step, against finite differences.

    python benchmarks/bench_derivative.py [--device cpu|cuda] [--dtypes DTYPE,...] [--json FILE]

The paper's Table 1 again: time, peak memory and error against float64, same model and batch, of

    jvp              this package: the tangents ride along with the training step's forward pass
    jvp, two passes  the same with a pass of its own for the tangents
    dde              the finite difference, two more forward passes
    public jvp       benchmarks/peers.py: torch.func.jvp with attention that stores its scores
    public dde       the public code's finite difference
"""

import sys

import peers

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["derivative", *sys.argv[1:]], peers))
