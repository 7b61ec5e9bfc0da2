"""Pictures of a trained network, from given noise, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from tim.config import RunConfig
from tim.data import to_uint8
from tim.graphs import check_device
from tim.models import load

if TYPE_CHECKING:
    from tim.models import TiMConfig
    from tim.pipeline import TiMPipeline

Conditions = Sequence[int] | Sequence[str]


@dataclass(frozen=True)
class GeneratorSettings:
    """How to sample. None: as the run has it, or as it is usual."""

    cfg_scale: float | None = None
    cfg_interval: tuple[float, float] | None = None
    negative_prompt: str | None = None
    shift: float | None = None
    size: tuple[int, int] | None = None
    """Width and height in pixels."""
    preset: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    tile: int | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if self.cfg_scale is not None and not self.cfg_scale >= 1:
            raise ValueError(f"cfg_scale must be at least 1 (no guidance), got {self.cfg_scale}")


class Generator:
    """Called with conditions [B], noise [B, *noise_shape] and a number of steps: pictures uint8
    [B, C, H, W] on the device.

    Attributes:
        noise_shape: of the noise of a picture.
        size: height and width of the pictures.
        num_classes: None for a text model, which is conditioned on prompts.
        identity: tells one set of weights and settings from another.
    """

    noise_shape: tuple[int, int, int]
    size: tuple[int, int]
    num_classes: int | None
    cfg_scale: float
    cfg_interval: tuple[float, float]
    identity: dict[str, Any]

    def __call__(self, conditions: Conditions, noise: Tensor, steps: int) -> Tensor:
        raise NotImplementedError

    def check(self, conditions: Conditions) -> None:
        """ValueError for labels that the network does not know."""
        if self.num_classes is not None and conditions:
            for label in (min(conditions), max(conditions)):
                if not 0 <= label < self.num_classes:
                    raise ValueError(f"classes must be in 0 .. {self.num_classes - 1}, got {label}")


class RunGenerator(Generator):
    """A run that models pixels by class, of any transport: nothing but its network is needed."""

    def __init__(
        self, run: Path, config: RunConfig, settings: GeneratorSettings, device: torch.device
    ) -> None:
        self.config, self.device, self.cuda_graph = config, device, settings.cuda_graph
        dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
        self.model = load(run, device=device, dtype=dtype)
        if settings.compile:
            self.model.compile(dynamic=False)
        if settings.cuda_graph:
            check_device(device, "cuda_graph")
        self.transport = config.transport.build()
        shape: TiMConfig = config.model
        self.size = (shape.input_size, shape.input_size)
        self.noise_shape = (shape.in_channels, *self.size)
        self.num_classes = shape.num_classes
        self.cfg_scale = _given(settings.cfg_scale, config.sample.cfg_scale)
        self.cfg_interval = _given(settings.cfg_interval, config.sample.cfg_interval)
        self.identity = {"weights": _fingerprint(run), "cfg": [self.cfg_scale, self.cfg_interval]}
        if dtype is not None:
            self.identity["dtype"] = settings.dtype

    def __call__(self, conditions: Conditions, noise: Tensor, steps: int) -> Tensor:
        import tim

        null = self.model.null_condition(len(noise)) if self.cfg_scale > 1 else None
        x = tim.sample(
            self.model,
            torch.as_tensor(conditions, device=self.device),
            noise.to(self.device),
            steps=steps,
            transport=self.transport,
            cfg_scale=self.cfg_scale,
            cfg_interval=self.cfg_interval,
            null=null,
            cuda_graph=self.cuda_graph,
            **self.config.objective.schedule(*noise.shape[2:]),
        )
        # Rounded and clipped, as in the files that other suites read.
        return to_uint8(x).permute(0, 3, 1, 2).to(self.device)


class PipelineGenerator(Generator):
    """Anything that `tim.pipeline` opens: latents, prompts, files of weights, hub ids."""

    def __init__(
        self,
        source: str | Path,
        config: RunConfig | None,
        settings: GeneratorSettings,
        device: torch.device,
    ) -> None:
        from tim.pipeline import open_pipeline

        name = settings.dtype
        if name == "auto":
            name = "bfloat16" if device.type == "cuda" else "float32"
        pipe: TiMPipeline = open_pipeline(
            source,
            dtype=getattr(torch, name),
            preset=settings.preset,
            vae=settings.vae,
            text_encoder=settings.text_encoder,
        )
        pipe.set_progress_bar_config(disable=True)
        if pipe.vae is not None or settings.tile is not None:
            pipe.enable_vae_tiling(settings.tile)
        self.pipe, self.device = pipe.to(device), device
        if settings.cuda_graph:
            check_device(device, "cuda_graph")
        pipe.accelerate(compile=settings.compile, cuda_graph=settings.cuda_graph)
        network = pipe.network.config
        self.num_classes = network.num_classes
        width, height = settings.size or (network.input_size * pipe.factor,) * 2
        for side, value in (("height", height), ("width", width)):
            if value % pipe.multiple:
                raise ValueError(
                    f"size: {side} must be a multiple of {pipe.multiple} (a token is that many "
                    f"pixels wide), got {value}"
                )
        self.size = (height, width)
        self.noise_shape = (network.in_channels, height // pipe.factor, width // pipe.factor)
        default = config.sample if config is not None else None
        self.cfg_scale = _given(settings.cfg_scale, default.cfg_scale if default else 1.0)
        interval = default.cfg_interval if default else (0.0, 1.0)
        self.cfg_interval = _given(settings.cfg_interval, interval)
        self.negative_prompt, self.shift = settings.negative_prompt, settings.shift
        if self.num_classes is not None and self.negative_prompt is not None:
            raise ValueError(f"negative_prompt needs a text model, {source} takes class labels")
        self.identity = {
            "weights": _fingerprint(Path(source)),
            "size": [width, height],
            "cfg": [self.cfg_scale, self.cfg_interval, self.negative_prompt],
            "encoders": [settings.vae, settings.text_encoder],
            "shift": self.shift,
            "dtype": name,
        }

    def __call__(self, conditions: Conditions, noise: Tensor, steps: int) -> Tensor:
        if self.num_classes is None:
            asked = {"prompt": list(conditions), "negative_prompt": self.negative_prompt}
        else:
            asked = {"class_labels": list(conditions)}
        pictures = self.pipe(
            **asked,
            height=self.size[0],
            width=self.size[1],
            num_inference_steps=steps,
            guidance_scale=self.cfg_scale,
            guidance_interval=self.cfg_interval,
            latents=noise,
            shift=self.shift,
            output_type="pt",
        ).images
        return (pictures.float() * 255).round().to(torch.uint8)


def open_generator(
    source: str | Path, settings: GeneratorSettings, device: torch.device
) -> Generator:
    """The generator for a run directory, or for anything else `tim.load` or a pipeline reads.

    Raises what `tim.load` and `tim.pipeline` raise, and ValueError for settings that do not fit.
    """
    source = Path(source) if Path(source).exists() else source
    saved = Path(source) / "config.yaml"
    config = RunConfig.load(saved) if saved.is_file() else None
    if config is not None and not _needs_pipeline(config, settings):
        return RunGenerator(Path(source), config, settings, device)
    return PipelineGenerator(source, config, settings, device)


def noise_of(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Noise [B, *shape] of the pictures with those numbers: the same for every number of steps,
    batch size and device."""
    rows = [np.random.default_rng([seed, i]).standard_normal(shape, np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def _needs_pipeline(config: RunConfig, settings: GeneratorSettings) -> bool:
    model = config.model
    asked = ("preset", "negative_prompt", "shift", "size", "vae", "text_encoder", "tile")
    return (
        model.in_channels not in (1, 3)
        or model.num_classes is None
        or any(getattr(settings, name) is not None for name in asked)
    )


def _fingerprint(source: Path) -> str:
    """Changes when the weights behind a path do: names, sizes and times of its files."""
    if not source.exists():
        return str(source)
    files = [source] if source.is_file() else sorted(source.rglob("*.safetensors"))
    about = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
