"""`tim prompts SOURCE`"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tim._flags import IntList
from tim.cli import parse
from tim.commands.sample import TEXT_CFG_SCALE, cut_captions_in_one_line
from tim.commands.sampling_flags import SamplingFlags
from tim.config import RunConfig


@dataclass(frozen=True)
class Prompts(SamplingFlags):
    """Sample the prompts of a benchmark into a folder that its own scorer reads: OUT/steps-N.

    A command that was stopped goes on when given again. docs/evaluation.md has the scorers."""

    source: tyro.conf.Positional[str]
    """A text model: run directory, weight file, hub id or pipeline, as for tim sample."""
    benchmark: Literal["geneval", "dpg-bench", "mjhq"]
    """Whose prompts these are."""
    prompts: Path
    """evaluation_metadata.jsonl of GenEval, the folder dpg_bench/prompts of DPG-Bench, or
    meta_data.json of MJHQ-30K."""
    out: Path
    """Folder for the pictures."""
    steps: IntList = (4,)
    """Numbers of steps."""
    images: int | None = None
    """Pictures for each prompt; by default 4, and 1 of MJHQ-30K."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 16
    """Pictures sampled at a time."""
    cfg_scale: float | None = None
    """Guidance scale; by default the run's, or 2.5."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(arguments: list[str]) -> int:
    command = parse(Prompts, "tim prompts", arguments, config=(tyro.conf.DisallowNone,))

    from tim.evaluate.benchmarks import sample_benchmark

    scale = command.cfg_scale
    saved = Path(command.source) / "config.yaml"
    if scale is None:
        config = RunConfig.load(saved) if saved.is_file() else None
        scale = config.sample.cfg_scale if config is not None else TEXT_CFG_SCALE
    settings = command.generator_settings(scale)
    with cut_captions_in_one_line("tim prompts"):
        folders = sample_benchmark(
            command.source,
            command.benchmark,
            command.prompts,
            command.out,
            steps=command.steps,
            images=command.images,
            seed=command.seed,
            batch_size=command.batch_size,
            settings=settings,
            device=command.device,
            progress=os.isatty(2),
        )
    for folder in folders:
        print(folder)
    return 0
