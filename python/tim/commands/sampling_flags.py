"""The flags that every command which samples has, with one meaning."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from tim.evaluate.generator import GeneratorSettings


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Which network samples what; None: as its run has it, or as it is usual."""

    size: str | None = None
    """Width and height in pixels, e.g. 1024x768; by default those trained on."""
    cfg_interval: tuple[float, float] | None = None
    """Guide where low < t < high, as shares of the largest time."""
    negative_prompt: str | None = None
    """What guidance leads away from; by default the empty prompt."""
    shift: float | None = None
    """Shift of the times; by default as the network was trained."""
    preset: str | None = None
    """Architecture of a weight file that does not tell its own, e.g. tim-xl2-256."""
    vae: str | None = None
    """Autoencoder of a network on latents: a folder or hub id of diffusers."""
    text_encoder: str | None = None
    """Text encoder of a text model: a folder or hub id of transformers."""
    tile: int | None = None
    """Decode pictures larger than this in tiles of this side; by default 2048 for autoencoders of
    factor 32 and 1024 for others."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the network and the text encoder; auto is bfloat16 on a GPU, but float32 for a run on
    pixels."""
    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    """The network through torch.compile: a minute for each shape, then faster steps."""
    cuda_graph: tyro.conf.FlagCreatePairsOff[bool] = False
    """Each step as one CUDA graph, on a GPU."""

    def generator_settings(self, cfg_scale: float | None) -> GeneratorSettings:
        from tim.evaluate.generator import GeneratorSettings

        names = [field.name for field in dataclasses.fields(SamplingFlags)]
        given = {name: getattr(self, name) for name in names}
        return GeneratorSettings(**{**given, "size": parse_size(self.size)}, cfg_scale=cfg_scale)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(width, height) of "1024x768". Raises ValueError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if match is None or "0" in (match[1], match[2]):
        raise ValueError(f"size must be WIDTHxHEIGHT in pixels, e.g. 1024x768, got {text!r}")
    return int(match[1]), int(match[2])
