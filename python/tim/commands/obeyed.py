"""`tim obeyed RUN`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from tim._flags import IntList
from tim.cli import parse
from tim.data.captioned_sets import HELD_OUT


@dataclass(frozen=True)
class Obeyed:
    """Whether a text model does what prompts say: the share of samples that a classifier, trained
    on the run's real pictures, takes for what was asked for. docs/text_to_image.md has a recipe.

    The run's captions are a .jsonl file whose records have labels, as tim dataset digits makes."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    steps: IntList = (1, 2, 4, 8, 16, 32)
    """Numbers of steps."""
    samples: int = 1000
    """Pictures for each number of steps."""
    seed: int = 0
    """Seed of noise, classifier and choice of prompts."""
    cfg_scale: float | None = None
    """Guidance scale; by default the run's."""
    held_out: str = HELD_OUT
    """Listing of held-out pictures, by its path or in the folder of the data: they judge the
    classifier, and their captions are prompts, too."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(arguments: list[str]) -> int:
    command = parse(Obeyed, "tim obeyed", arguments, config=(tyro.conf.DisallowNone,))

    from rich.console import Console
    from rich.table import Table

    from tim.prompt_accuracy import RESULT, prompt_accuracy

    found = prompt_accuracy(
        command.run,
        steps=command.steps,
        samples=command.samples,
        seed=command.seed,
        cfg_scale=command.cfg_scale,
        held_out=command.held_out,
        device=command.device,
    )
    table = Table(title=f"{found.samples} samples taken for what the prompt asked for")
    for column in ("steps", "prompts trained on", "prompts held out"):
        table.add_column(column, justify="right")
    for steps, trained, held_out in zip(found.steps, found.trained, found.held_out, strict=True):
        table.add_row(f"{steps}", f"{trained:.1%}", f"{held_out:.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"the classifier's accuracy on held-out pictures: {found.classifier_accuracy:.1%}; "
        f"chance: {found.chance:.1%}"
    )
    console.print(str(command.run / RESULT), soft_wrap=True)
    return 0
