"""Kernel launches of a training step, by phase; needs no GPU.

python benchmarks/bench_launches.py [--device cpu|cuda] [--size SIZE] [--json FILE]

jvp, dde                          this package, exact derivative and finite difference
jvp, references; dde, references  the same with every operation's PyTorch reference
public dde, public jvp            benchmarks/peers.py: differences, and eager torch.func.jvp
"""

import sys

import peers

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["launches", *sys.argv[1:]], peers))
