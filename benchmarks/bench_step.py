"""The training step: exact derivative, finite difference, and the public code's arrangement of it.

    python benchmarks/bench_step.py [--device cpu|cuda] [--sizes SIZE,...] [--json FILE]

Time, peak memory beyond weights and optimizer, and error of the time derivative against float64 of

    jvp, dde                          this package, exact derivative and finite difference
    jvp, references; dde, references  the same with every operation's PyTorch reference
    public dde                        benchmarks/peers.py; with --compile also through torch.compile

at two sizes of the model.
"""

import sys

import peers

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["step", *sys.argv[1:]], peers))
