"""Target, error and weights of the objective in one pass, against PyTorch.

Measured with the exact derivative of half of the batch, and (transition_loss_dde) with both ends of
its central difference. Data are float32 whatever the dtype of the prediction, as under autocast.

    python benchmarks/bench_transition_loss.py [--device cpu|cuda] [--sizes SIZE,...] [--json FILE]

Bound by memory: the backward pass reads prediction and target and writes the gradient.
"""

import sys

from tim.bench import main

if __name__ == "__main__":
    sys.exit(main(["transition_loss", *sys.argv[1:]]))
