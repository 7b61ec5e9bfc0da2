"""A step of the sampler: network and transition, for one image and for a batch.

python benchmarks/bench_sampling.py [--device cpu|cuda] [--sizes SIZE,...] [--json FILE]

tim                 this package; on a GPU also with every step as one CUDA graph
tim, references     the same with every operation's PyTorch reference
public              benchmarks/peers.py's network; with --compile also through torch.compile
"""

import sys

import peers

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["sampling", *sys.argv[1:]], peers))
