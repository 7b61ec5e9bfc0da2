"""`tim evaluate RUN`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from tim._flags import IntList
from tim.cli import parse


@dataclass(frozen=True)
class Evaluate:
    """Measure samples of a run's averaged weights against held-out real images: quality.json and
    quality.png in the run directory. For labelled data with a held-out part (digits, idx files)."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    steps: IntList = (1, 2, 4, 8, 16, 32)
    """Numbers of steps."""
    samples: int | None = None
    """Images per number of steps; by default as many as there are training images."""
    seed: int = 0
    """Seed of noise and classifier."""
    cfg_scale: float | None = None
    """Guidance scale; by default the run's own."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(arguments: list[str]) -> int:
    command = parse(Evaluate, "tim evaluate", arguments, config=(tyro.conf.DisallowNone,))

    from rich.console import Console
    from rich.table import Table

    from tim.evaluate import classifier_quality

    quality = classifier_quality(
        command.run,
        steps=command.steps,
        samples=command.samples,
        seed=command.seed,
        cfg_scale=command.cfg_scale,
        device=command.device,
    )
    table = Table(title=f"{quality.samples} samples against {quality.held_out} held-out images")
    for heading in ("steps", "Frechet distance", "taken for the class asked for"):
        table.add_column(heading, justify="right")
    for row in zip(quality.steps, quality.distance, quality.agreement, strict=True):
        table.add_row(f"{row[0]}", f"{row[1]:.2f}", f"{row[2]:.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"floor, real training images: {quality.real:.2f}; ceiling, noise: {quality.noise:.2f}\n"
        f"classifier's accuracy on held-out images: {quality.classifier_accuracy:.1%}"
    )
    for fewer, more in quality.not_better():
        console.print(f"{more} steps were no better than {fewer}")
    console.print(str(command.run / "quality.png"), soft_wrap=True)
    return 0
