"""Latency of sampling by number of steps, for one image and for a batch.

python benchmarks/bench_sampling.py [--device cpu|cuda] [--sizes SIZE,...] [--steps 1,4,16]
    [--batches 1,16] [--dtypes float32,bfloat16] [--compile] [--json FILE]

tim                 this package; on a GPU also with every step as one CUDA graph, with --compile
                    also through torch.compile
tim, references     the same with every operation's PyTorch reference
public              benchmarks/peers.py's network; with --compile also through torch.compile
"""

import sys

import peers

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["sampling", *sys.argv[1:]], peers))
