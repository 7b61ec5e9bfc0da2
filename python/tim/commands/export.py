"""`tim export RUN --out FILE.safetensors`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tim.cli import parse


@dataclass(frozen=True)
class Export:
    """Write the weights of a run as one safetensors file, from a checkpoint of one process or of
    many. tim.load reads it by itself: the file carries the model's configuration."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    out: Path
    """File to write, .safetensors."""
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights, which samples are drawn with, or those being trained."""
    step: int | None = None
    """Checkpoint to take; by default the newest."""


def main(arguments: list[str]) -> int:
    command = parse(Export, "tim export", arguments)
    if command.out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {command.out}")
    if not command.out.absolute().parent.is_dir():
        raise ValueError(f"--out must be in a folder that exists, got {command.out}")

    from tim.checkpoint import export_weights

    checkpoint = export_weights(command.run, command.out, command.weights, command.step)
    print(f"{command.weights} weights of {checkpoint}: {command.out}")
    return 0
