"""The configuration of a run: nested dataclasses, the flags of `tim train`, and config.yaml.

A preset (`tim.presets`) is a RunConfig; flags change single fields of it; the result is written to
the run directory and is all that a resumed run or the sampler needs to know.
"""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from tim._flags import Hidden, IntList
from tim.models import TiMConfig

if TYPE_CHECKING:
    from tim.objective import TransitionLoss
    from tim.transports import Transport

T = TypeVar("T")

#: Of `parallel.timeout`, in seconds: a week. Clocks of torch.distributed overflow.
LONGEST_TIMEOUT = 604800


@dataclass(frozen=True)
class TransportConfig:
    """How noise and data mix; None takes the transport's own default."""

    name: Literal["ot_fm", "trigflow", "edm", "vp", "ve"] = "ot_fm"
    P_mean: float | None = None
    """Mean of log(sigma / alpha) of the training times (ot_fm, trigflow, edm)."""
    P_std: float | None = None
    """Standard deviation of log(sigma / alpha) (ot_fm, trigflow, edm)."""
    sigma_d: float | None = None
    """Standard deviation assumed of the data."""
    T_min: float | None = None
    T_max: float | None = None
    beta_min: float | None = None
    """Noise rate at t = 0 (vp)."""
    beta_d: float | None = None
    """Growth of the noise rate (vp)."""

    def build(self) -> Transport:
        from tim import transports

        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        known = {f.name for f in dataclasses.fields(transports.TRANSPORTS[self.name])}
        if foreign := [name for name in given if name not in known and name != "name"]:
            flags = " ".join(f"--transport.{name.replace('_', '-')} None" for name in foreign)
            raise ValueError(f"{self.name} has no {', '.join(foreign)}: give {flags}")
        return transports.get(**given)


@dataclass(frozen=True)
class GuidanceConfig:
    """Guidance in training: predictions of the averaged model enter the target's velocity."""

    enabled: bool = False
    w_gt: float = 1.0
    w_cond: float = 0.75
    w_start: float = 0.3
    """Guide from this time on."""
    w_end: float = 0.8
    """Guide up to this time."""
    along: Literal["guided", "data"] = "guided"
    """Velocity the derivative follows; "data" is what the published code does."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training loss (arXiv 2509.04394)."""

    derivative: Literal["jvp", "dde"] = "jvp"
    """Exact (jvp) or finite-difference (dde) time derivative of the network."""
    epsilon: float = 0.005
    """Step of the finite difference."""
    diffusion_ratio: float = 0.5
    """Share of the batch with r = t (no derivative)."""
    consistency_ratio: float = 0.1
    """Share of the batch with r = T_min."""
    time_weight: Literal["constant", "reciprocal", "sqrt", "square", "soft-min-snr"] = "sqrt"
    time_weight_map: Literal["tangent", "sigmoid"] | None = "tangent"
    """Map of t and r in front of the time weight."""
    cosine: bool = True
    """Add 1 - cosine between prediction and target."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    projection_weight: float = 1.0
    """Weight of the projection loss, where the data come with features."""
    shift_base: int | None = None
    """Shift the times, in training and sampling, by the root of the latents' height times width
    over this, that of a 1024 x 1024 image: 1024 with an autoencoder of factor 32."""

    def schedule(self, height: int, width: int) -> dict[str, Any]:
        """Arguments of `tim.sample` for the times of latents of that size, as in training."""
        from tim.schedule import resolution_shift

        if self.shift_base is None:
            return {"schedule": "linear"}
        return {
            "schedule": "shifted",
            "shift": resolution_shift(height * width, self.shift_base),
        }

    def build(self, transport: Transport) -> TransitionLoss:
        from tim.objective import TransitionLoss

        guidance = dataclasses.asdict(self.guidance)
        return TransitionLoss(
            transport=transport,
            derivative=self.derivative,
            epsilon=self.epsilon,
            diffusion_ratio=self.diffusion_ratio,
            consistency_ratio=self.consistency_ratio,
            time_weight=self.time_weight,
            time_weight_map=self.time_weight_map,
            cosine=self.cosine,
            guidance=guidance if guidance.pop("enabled") else None,
            shift_base=self.shift_base,
        )


@dataclass(frozen=True)
class DataConfig:
    """The training images."""

    kind: Literal["digits", "folder", "arrays", "latents"] = "digits"
    """scikit-learn's digits, a folder of images or of .tar files (WebDataset), an .npz file / idx
    pair, or latents: shards of tim encode, or files for each image as the public code has them."""
    path: str | None = None
    """The folder or file (not for digits)."""
    image_size: int = 64
    """Side that images of a folder are cropped and resized to."""
    channels: Literal[1, 3] = 3
    """Grey or colour (folder)."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    workers: int = 4
    """Threads that decode images (folder)."""
    processes: int = 0
    """Processes that decode images, in place of threads (folder); one that dies is replaced."""
    window: int | None = None
    """Shuffle over so many shards at a time, and have ranks read different ones (.tar files,
    latents of tim encode); by default over all images."""
    captions: str | None = None
    """Captions in place of labels (folder): txt, the .txt file beside each image, or a .jsonl file
    of records with file_name and caption(s). Latents bring theirs."""
    text_encoder: str | None = None
    """Encoder of the captions of a text model: a folder or hub id of transformers."""
    max_tokens: int = 256
    """Longer captions are cut."""
    escape: bool = True
    """Write characters outside ASCII in captions as backslash escapes, as the released text model
    has them."""
    pack: bool = False
    """Put images of different sizes into one batch, as one sequence without padding (shards of tim
    encode). By default a batch is of images of one size."""
    token_budget: int | None = None
    """Most tokens of a packed batch, over all parts and ranks: it has as many images as fit, up to
    train.batch_size. By default as many as that, whatever their tokens."""
    budget_multiple: int = 1
    """With token_budget: images of a batch are a multiple of this, and each such share of them has
    at most its share of the budget. A multiple of train.accumulate times the number of ranks."""
    vae: str | None = None
    """Autoencoder of the latents, for tim sample; by default the one of tim encode."""
    features: str | None = None
    """Encoder of features for the projection loss, for images of pixels: of transformers, or
    package.module:attribute. Latents bring theirs."""
    feature_files: str | None = None
    """Folder of features computed beforehand, a .safetensors file for each image (folder, and
    latents of a file for each image)."""
    cache_gb: float = 2.0
    """Keep decoded images in memory when all of them fit in so many gigabytes (folder)."""

    def __post_init__(self) -> None:
        _check(self, "data", image_size=1, workers=1, cache_gb=0, max_tokens=1)
        _check(self, "data", processes=0, budget_multiple=1)
        if self.window is not None:
            _check(self, "data", window=1)
            if self.kind in ("digits", "arrays"):
                raise ValueError(
                    f"data.window must be None for data.kind {self.kind}, got {self.window}"
                )
        if self.processes and self.kind != "folder":
            raise ValueError(
                f"data.processes must be 0 for data.kind {self.kind}, which has nothing to decode, "
                f"got {self.processes}"
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip must be in [0, 1], got {self.flip}")
        if self.pack and self.kind != "latents":
            raise ValueError(f"data.pack needs data.kind latents, got {self.kind}")
        if self.feature_files is not None:
            if self.kind not in ("folder", "latents"):
                raise ValueError(
                    f"data.feature_files needs data.kind folder or latents, got {self.kind}"
                )
            if self.features is not None:
                raise ValueError("give one of data.features and data.feature_files, got both")
        if self.token_budget is not None:
            _check(self, "data", token_budget=1)
            if not self.pack:
                raise ValueError(f"data.token_budget needs data.pack, got {self.token_budget}")
            if self.window is not None:
                raise ValueError(
                    f"data.window must be None with data.token_budget, got {self.window}"
                )


@dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    steps: int = 1000
    batch_size: int = 64
    """Images per step, over all accumulated parts."""
    accumulate: int = 1
    """Parts a batch is split into to save memory."""
    lr: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine falls to zero at the last step."""
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 runs the network under autocast; weights stay float32."""
    cuda_graph: bool = False
    """Launch a step as one CUDA graph: for steps whose kernels are too short for the host."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights per step."""
    ema_halflife_images: int | None = None
    """Half-life of the averaged weights in images; replaces ema_decay."""
    ema_rampup: float = 0.05
    """The half-life is at most this share of the images seen so far; 0 turns the limit off."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    max_bad_steps: int = 10
    """Stop after so many steps in a row with a loss or gradient that is not finite."""
    checkpoint_every: int = 1000
    keep: int = 2
    """Newest checkpoints that are kept."""
    log_every: int = 50
    sample_every: int = 1000
    """Steps between sample grids; 0 for none."""
    tensorboard: bool = True
    """Write TensorBoard files where TensorBoard is installed."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "accumulate", "max_bad_steps", "keep")
        _check(self, "train", **dict.fromkeys(positive, 1))
        _check(self, "train", checkpoint_every=1, log_every=1, sample_every=0, warmup_steps=0)
        _check(self, "train", lr=0, clip_norm=0, ema_rampup=0, weight_decay=0, seed=0)
        if self.ema_halflife_images is not None:
            _check(self, "train", ema_halflife_images=1)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size must be a multiple of train.accumulate = {self.accumulate}, "
                f"got {self.batch_size}"
            )


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes (torchrun) train one model together."""

    strategy: Literal["ddp", "fsdp", "hybrid"] = "ddp"
    """ddp: the whole model on every rank; fsdp: weights, averages and optimizer state cut up over
    all ranks; hybrid: over groups of ranks."""
    shard_size: int | None = None
    """Ranks of a group (hybrid); by default those of one machine."""
    reshard: bool = True
    """Give a block's weights back after its forward pass: less memory, more communication (fsdp,
    hybrid)."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: nccl between GPUs, gloo between CPUs."""
    timeout: float = 600.0
    """Seconds without progress after which a run is stopped and the rank that hangs is named: more
    than a sample grid takes, or writing a checkpoint."""

    def __post_init__(self) -> None:
        if self.shard_size is not None:
            _check(self, "parallel", shard_size=1)
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise ValueError(
                f"parallel.timeout must be positive and at most {LONGEST_TIMEOUT} s, "
                f"got {self.timeout}"
            )


@dataclass(frozen=True)
class SampleConfig:
    """The sample grids of the trainer and the defaults of `tim sample`."""

    steps: IntList = (1, 2, 4, 8, 32)
    """One row of pictures for each number of steps."""
    columns: int = 10
    """Pictures in a row; the classes in turn."""
    prompts: tuple[str, ...] = ()
    """Of a text model, what the columns show; by default captions of the data."""
    cfg_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Guide where low < t / T_max < high."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, "sample", columns=1, seed=0)
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"sample.steps must be positive, got {self.steps}")


@dataclass(frozen=True)
class RunConfig:
    """All there is to know about a run."""

    preset: Hidden
    model: TiMConfig
    transport: TransportConfig = field(default_factory=TransportConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def save(self, path: str | os.PathLike) -> None:
        """Write the configuration as YAML; a reader never sees half of it."""
        import yaml

        path = Path(path)
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        temporary.write_text(yaml.safe_dump(to_dict(self), sort_keys=False))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> RunConfig:
        """The configuration in a YAML file.

        Raises FileNotFoundError, and ValueError (file and field named) for anything that is not a
        RunConfig.
        """
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            detail = " ".join(str(error).split())
            raise ValueError(f"{path} is not a YAML file: {detail}") from None
        try:
            return from_dict(cls, values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a config dataclass: what YAML and JSON can hold."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return plain(config)


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Build config dataclass `cls` from nested plain values; fields that are absent keep defaults.

    Raises TypeError or ValueError that name the field (`train.steps`), what was given and what was
    expected.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{where or 'the configuration'} must be a mapping, got {values!r}")
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in known:
            raise ValueError(f"unknown field {prefix}{key}; known are {', '.join(known)}")
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = f.default is f.default_factory is dataclasses.MISSING
        if required and f.name not in values:
            raise ValueError(f"field {prefix}{f.name} is missing")
    return cls(**{k: _convert(hints[k], v, prefix + k) for k, v in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as type `hint`, or TypeError / ValueError naming the field `where`."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _convert(arguments[0], value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _convert(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} must be one of {_listing(arguments)}, got {value!r}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(arguments) != len(value):
            raise ValueError(f"{where} must have {len(arguments)} values, got {len(value)}")
        return tuple(_convert(a, v, where) for a, v in zip(arguments, value, strict=True))
    if hint is float:
        # YAML 1.1 reads 1e-4 (no dot) as a string.
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
    elif type(value) is hint:
        return value
    expected = "a list" if origin is tuple else getattr(hint, "__name__", str(hint))
    raise TypeError(f"{where} must be {expected}, got {value!r}")


def _listing(values: tuple) -> str:
    return ", ".join(str(value) for value in values)


def differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Fields in which two config dataclasses of one type differ: (dotted name, old, new)."""
    found = []
    for f in dataclasses.fields(old):
        name, a, b = f"{where}{f.name}", getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(a):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append((name, a, b))
    return found


def _check(config: Any, section: str, **minima: float) -> None:
    for name, minimum in minima.items():
        value = getattr(config, name)
        if not value >= minimum:
            raise ValueError(f"{section}.{name} must be at least {minimum}, got {value}")
