"""`tim sample SOURCE`"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from tim._flags import IntList
from tim.cli import parse
from tim.commands.sampling_flags import SamplingFlags, parse_size
from tim.config import RunConfig, SampleConfig

if TYPE_CHECKING:
    from PIL import Image

    from tim.pipeline import TiMPipeline

#: Guidance of text models where none is asked for; what the paper's text-to-image samples have.
TEXT_CFG_SCALE = 2.5


@dataclass(frozen=True)
class Sample(SamplingFlags):
    """Draw samples: a row for each number of steps, all rows from the same noise.

    SOURCE is a run (its averaged weights are taken, and from its configuration what is not given),
    or anything else tim.load reads: a weight file, a hub id such as GoodEnough/TiM-T2I, or a saved
    pipeline. Latents and prompts need the extra t2i."""

    source: tyro.conf.Positional[str]
    """Run directory, weight file, hub id or pipeline."""
    prompt: tuple[str, ...] = ()
    """What to show, for a text model: one or more prompts, a column each."""
    classes: IntList | None = None
    """Class of each column, e.g. 0,1,2."""
    steps: IntList | None = None
    """Numbers of steps, e.g. 1,2,4,8,32."""
    cfg_scale: float | None = None
    """Guidance scale; 1 is none. By default the run's, or 2.5 with prompts and 1 without."""
    seed: int | None = None
    """Seed of the noise."""
    out: Path | None = None
    """Picture to write; by default samples/ in the run directory, or the working directory."""
    rope: Literal["none", "linear", "ntk-aware", "ntk-by-parts", "yarn"] | None = None
    """Positions of pictures larger than those trained on; by default as the network has them."""
    rope_train_size: int | None = None
    """Tokens of the training images along a side, for --rope."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(arguments: list[str]) -> int:
    command = parse(Sample, "tim sample", arguments, config=(tyro.conf.DisallowNone,))
    size = parse_size(command.size)
    if command.rope_train_size is not None and command.rope is None:
        raise ValueError("rope-train-size needs --rope")
    run = Path(command.source)
    saved = run / "config.yaml"
    config = RunConfig.load(saved) if saved.is_file() else None
    settings = _settings(command, config)

    from tim.grid import image_grid, picture_format, save_picture

    name = f"steps-{'-'.join(map(str, settings.steps))}.png"
    out = command.out or (run / "samples" / name if config is not None else Path(name))
    picture_format(out)
    if config is not None and _is_plain(command, config):
        rows = _rows_of_run(command, dataclasses.replace(config, sample=settings))
    else:
        with cut_captions_in_one_line("tim sample"):
            rows = _rows_of_pipeline(command, settings, config, size)
    single = len(rows) == 1 and len(rows[0]) == 1
    picture = _picture(rows[0][0]) if single else image_grid(rows, settings.steps)
    save_picture(picture, out)
    print(out)
    return 0


def _is_plain(command: Sample, config: RunConfig) -> bool:
    """Whether the run models pixels by class, so that nothing but the network is needed."""
    asked = (
        command.prompt,
        command.size,
        command.preset,
        command.negative_prompt,
        command.vae,
        command.text_encoder,
        command.shift,
        command.tile,
        command.rope,
    )
    return (
        config.model.in_channels in (1, 3)
        and config.model.num_classes is not None
        and not any(value not in (None, ()) for value in asked)
    )


def _settings(command: Sample, config: RunConfig | None) -> SampleConfig:
    names = ("steps", "seed", "cfg_scale", "cfg_interval")
    asked = {n: v for n in names if (v := getattr(command, n)) is not None}
    if config is not None:
        return dataclasses.replace(config.sample, **asked)
    scale = TEXT_CFG_SCALE if command.prompt else 1.0
    return SampleConfig(**{"steps": (1, 4, 16), "cfg_scale": scale, "columns": 1, **asked})


def _rows_of_run(command: Sample, config: RunConfig) -> list:
    import torch

    from tim.data import to_uint8
    from tim.graphs import check_device
    from tim.models import load
    from tim.trainer import pick_device, sample_rows

    device = pick_device(command.device)
    if command.cuda_graph:
        check_device(device, "cuda_graph")
    dtype = None if command.dtype == "auto" else getattr(torch, command.dtype)
    model = load(command.source, device=device, dtype=dtype)
    if command.compile:
        model.compile(dynamic=False)
    known = config.model.num_classes
    classes = list(command.classes or [i % known for i in range(config.sample.columns)])
    for label in classes:
        if not 0 <= label < known:
            raise ValueError(f"classes must be in 0 .. {known - 1}, got {label}")
    rows = sample_rows(model, config, classes, device, cuda_graph=command.cuda_graph)
    return [to_uint8(x) for x in rows]


def _rows_of_pipeline(
    command: Sample,
    settings: SampleConfig,
    config: RunConfig | None,
    size: tuple[int, int] | None,
) -> list:
    import torch

    from tim.graphs import check_device
    from tim.pipeline import open_pipeline
    from tim.trainer import pick_device

    device = pick_device(command.device)
    if command.cuda_graph:
        check_device(device, "cuda_graph")
    dtype = command.dtype if command.dtype != "auto" else None
    if dtype is None:
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    pipe = open_pipeline(
        command.source,
        dtype=getattr(torch, dtype),
        preset=command.preset,
        vae=command.vae,
        text_encoder=command.text_encoder,
    )
    condition = _condition(command, settings, pipe)
    if command.rope is not None:
        pipe.set_rope(command.rope, train_size=command.rope_train_size)
    width, height = size or (None, None)
    if pipe.vae is not None or command.tile is not None:
        pipe.enable_vae_tiling(command.tile)
    pipe.to(device)
    pipe.accelerate(compile=command.compile, cuda_graph=command.cuda_graph)
    pipe.set_progress_bar_config(disable=not os.isatty(2))
    rows = []
    for steps in settings.steps:
        # Drawn on the CPU, so that a seed means the same pictures on every device.
        pictures = pipe(
            **condition,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=settings.cfg_scale,
            guidance_interval=settings.cfg_interval,
            generator=torch.Generator().manual_seed(settings.seed),
            shift=command.shift,
            output_type="pt",
        ).images
        rows.append((pictures.cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
    return rows


def _condition(command: Sample, settings: SampleConfig, pipe: TiMPipeline) -> dict[str, object]:
    classes = pipe.network.config.num_classes
    if classes is None:
        prompts = list(command.prompt or settings.prompts)
        if not prompts or command.classes:
            raise ValueError(f"{command.source} is a text model: give --prompt and no --classes")
        return {"prompt": prompts, "negative_prompt": command.negative_prompt}
    if command.prompt or command.negative_prompt:
        raise ValueError(f"{command.source} takes class labels: give --classes and no prompts")
    return {"class_labels": list(command.classes or [i % classes for i in range(settings.columns)])}


def _picture(pixels) -> Image.Image:
    from PIL import Image

    array = pixels.numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


@contextlib.contextmanager
def cut_captions_in_one_line(command: str) -> Iterator[None]:
    """Tells of captions that are cut without the place in the source that Python adds."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message, category, *rest) -> None:
            if category is UserWarning and " captions have more than " in str(message):
                print(f"{command}: {message}", file=sys.stderr)
            else:
                plain(message, category, *rest)

        warnings.showwarning = show
        yield
