"""How far the time derivative of a whole network is from float64, exact and by differences.

    python benchmarks/derivative_accuracy.py [--run RUN] [--json FILE] [--plot FILE]

dF of the samples with r < t of one batch, as the training step takes it, in float32 and under bf16
autocast: `jvp` by this package and by the public arrangement (peers.py), `dde` of both for half
widths from 0.001 to 0.05. Networks: one with random weights and, with --run, the averaged
weights of a run on the scanned digits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import peers
import torch

import tim
from tim.bench import derivative, machine
from tim.bench.problem import relative_error
from tim.bench.step import Setup, StepSize
from tim.data.digits import digits
from tim.models import TiMConfig

EPSILONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
DTYPES = (torch.float32, torch.bfloat16)
BATCH = 16
#: Drawn in this order: way, dtype, style.
LINES = (
    ("public dde", "bfloat16", "C3--"),
    ("dde", "bfloat16", "C3-"),
    ("public jvp", "bfloat16", "C0--"),
    ("jvp", "bfloat16", "C0-"),
    ("dde", "float32", "C1-"),
    ("jvp", "float32", "C2-"),
)


def random_network() -> Setup:
    config = TiMConfig(input_size=16, hidden_size=192, depth=6, num_heads=3, num_classes=10)
    size = StepSize("random", config, BATCH)
    return Setup.random(size, torch.float32, torch.device("cpu"))


def trained_network(run: str) -> Setup:
    """The averaged weights of a run, on real digits."""
    model = tim.load(run)
    size = StepSize("trained", model.config, BATCH)
    setup = Setup.random(size, torch.float32, torch.device("cpu"))
    setup.model.load_state_dict(model.state_dict())
    batch = digits("test").batch(np.arange(BATCH), np.random.default_rng(0))
    return replace(setup, x=batch.x, y=batch.y)


def errors(setup: Setup) -> dict[str, dict[str, list[float]]]:
    """Relative error by dtype and way: of dde for each of EPSILONS, of jvp one."""
    n = len(setup.x) // 2
    exact = setup.exact_derivative()[n:]
    found: dict[str, dict[str, list[float]]] = {}
    for dtype in DTYPES:
        ways = found[machine.name_of(dtype)] = {}
        for epsilon in EPSILONS:
            typed = replace(setup, dtype=dtype)
            operators = derivative.own_operators(typed, epsilon) | peers.operators(typed, epsilon)
            for way, operator in operators.items():
                if way.endswith("dde") or way not in ways:
                    ways.setdefault(way, []).append(relative_error([operator()], [exact]))
    return found


def plot(networks: dict[str, dict], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(networks), 3.8), layout="constrained")
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axes, (title, found) in zip(panels, networks.items(), strict=True):
        for way, dtype, style in LINES:
            values = found[dtype][way]
            values = values * len(EPSILONS) if len(values) == 1 else values
            axes.loglog(EPSILONS, values, style, label=f"{way}, {dtype}")
        axes.set(title=title, xlabel="half width of the difference")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("error of dF relative to float64")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=120, format="png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="a run on the digits, beside the random network")
    parser.add_argument("--json", help="write the errors there")
    parser.add_argument("--plot", help="write a picture there")
    options = parser.parse_args(arguments)
    setups = {"random weights, 64 tokens, 6 blocks": random_network()}
    if options.run:
        setups["trained on digits, 16 tokens, 4 blocks"] = trained_network(options.run)
    networks = {}
    for title, setup in setups.items():
        print(title, flush=True)
        networks[title] = errors(setup)
        for dtype, ways in networks[title].items():
            for way, values in ways.items():
                print(f"  {dtype:9} {way:11}", *(f"{value:.2e}" for value in values))
    if options.json:
        result = {
            "machine": machine.describe(torch.device("cpu")),
            "epsilons": EPSILONS,
            "batch": BATCH,
            "errors": networks,
        }
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(networks, options.plot)


if __name__ == "__main__":
    main()
