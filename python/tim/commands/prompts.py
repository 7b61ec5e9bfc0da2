"""`tim prompts SOURCE`"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tim._flags import IntList
from tim.cli import parse
from tim.commands.sample import TEXT_CFG_SCALE, cut_captions_in_one_line, parse_size
from tim.config import RunConfig


@dataclass(frozen=True)
class Prompts:
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
    size: str | None = None
    """Width and height in pixels, e.g. 1024x1024; by default those trained on."""
    cfg_scale: float | None = None
    """Guidance scale; by default the run's, or 2.5."""
    cfg_interval: tuple[float, float] | None = None
    """Guide where low < t < high, as shares of the largest time."""
    negative_prompt: str | None = None
    """What guidance leads away from; by default the empty prompt."""
    shift: float | None = None
    """Shift of the times; by default as the network was trained."""
    preset: str | None = None
    """Architecture of a weight file that does not tell its own, e.g. tim-t2i-xl1."""
    vae: str | None = None
    """Autoencoder of a network on latents: a folder or hub id of diffusers."""
    text_encoder: str | None = None
    """Text encoder: a folder or hub id of transformers."""
    tile: int | None = None
    """Decode pictures larger than this in tiles of this side."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the network and the text encoder; auto is bfloat16 on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(arguments: list[str]) -> int:
    command = parse(Prompts, "tim prompts", arguments, config=(tyro.conf.DisallowNone,))

    from tim.evaluate.benchmarks import sample_benchmark
    from tim.evaluate.generator import GeneratorSettings

    scale = command.cfg_scale
    saved = Path(command.source) / "config.yaml"
    if scale is None:
        config = RunConfig.load(saved) if saved.is_file() else None
        scale = config.sample.cfg_scale if config is not None else TEXT_CFG_SCALE
    settings = GeneratorSettings(
        cfg_scale=scale,
        cfg_interval=command.cfg_interval,
        negative_prompt=command.negative_prompt,
        shift=command.shift,
        size=parse_size(command.size),
        preset=command.preset,
        vae=command.vae,
        text_encoder=command.text_encoder,
        tile=command.tile,
        dtype=command.dtype,
    )
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
