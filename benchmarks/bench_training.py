"""Training on one rank and on several: images/s, peak memory, how it scales.

    python benchmarks/bench_training.py [--device cpu|cuda] [--ranks 1,2] [--compile] [--json FILE]

Whole steps, on several ranks with DDP and the same batch for each rank, of

    jvp, dde                          this package, exact derivative and finite difference
    jvp, references; dde, references  the same with every operation's PyTorch reference
    public dde                        benchmarks/peers.py: the public code's step

With --compile each of them also through torch.compile.
"""

import sys

import peers

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["training", *sys.argv[1:]], peers))
