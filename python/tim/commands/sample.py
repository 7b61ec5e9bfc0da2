"""`tim sample RUN`"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import tyro

from tim.cli import parse
from tim.config import IntList, RunConfig


@dataclass(frozen=True)
class Sample:
    """Draw samples from the averaged weights of a run: a row for each number of steps, all rows
    from the same noise. What is not given is taken from the run's configuration."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    steps: IntList | None = None
    """Numbers of steps, e.g. 1,2,4,8,32."""
    out: Path | None = None
    """Picture to write; by default samples/ in the run directory."""
    seed: int | None = None
    """Seed of the noise."""
    classes: IntList | None = None
    """Class of each column, e.g. 0,1,2."""
    cfg_scale: float | None = None
    """Guidance scale; 1 is none."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(arguments: list[str]) -> int:
    command = parse(Sample, "tim sample", arguments, config=(tyro.conf.DisallowNone,))
    config = RunConfig.load(command.run / "config.yaml")
    asked = {name: getattr(command, name) for name in ("steps", "seed", "cfg_scale")}
    changes = {name: value for name, value in asked.items() if value is not None}
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, **changes))

    from tim.data import to_uint8
    from tim.grid import image_grid, picture_format, save_picture
    from tim.models import load
    from tim.trainer import pick_device, sample_rows

    steps = config.sample.steps
    out = command.out or command.run / "samples" / f"steps-{'-'.join(map(str, steps))}.png"
    picture_format(out)
    if config.model.in_channels not in (1, 3):
        raise ValueError(
            f"{command.run} was trained on latents of {config.model.in_channels} channels, a "
            "picture has 1 or 3: decode what tim.sample returns"
        )
    device = pick_device(command.device)
    model = load(command.run, device=device)
    known = config.model.num_classes
    classes = list(command.classes or [i % known for i in range(config.sample.columns)])
    for label in classes:
        if not 0 <= label < known:
            raise ValueError(f"classes must be in 0 .. {known - 1}, got {label}")
    rows = [to_uint8(x) for x in sample_rows(model, config, classes, device)]
    save_picture(image_grid(rows, steps), out)
    print(out)
    return 0
