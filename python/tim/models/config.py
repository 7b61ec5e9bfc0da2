"""Everything that fixes the architecture of a TiM network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Condition = Literal["t-r", "r", "t,r", "t,t-r", "r,t-r", "t,r,t-r"]
RopeGrid = Literal["spatial", "released"]
RopeScaling = Literal["none", "linear", "ntk-aware", "ntk-by-parts", "yarn"]

#: What the public implementation assumes where a YAML says nothing and our own default differs.
_RELEASED_DEFAULTS: dict[str, Any] = {
    "use_new_embed": False,
    "distance_aware": False,
    "z_dim": 768,
    "rope_grid": "released",
}
#: Keys of public YAMLs that are no choice here, with the one value this network implements;
#: `use_checkpoint` is a matter of the run (`TiM.gradient_checkpointing`), not of the network.
_RELEASED_CONSTANTS: dict[str, Any] = {"mlp_ratio": 4.0, "swiglu": True}
_RELEASED_IGNORED = {"use_checkpoint"}


@dataclass(frozen=True)
class TiMConfig:
    """Architecture of a TiM network; the fields carry the names of the released `network.params`.

    Exactly one of `num_classes` and `cap_feat_dim` is set: class labels or captions.
    """

    input_size: int = 32
    """Height and width of the training latents. The network accepts any multiples of patch_size."""
    patch_size: int = 2
    """Side of the square that becomes one token."""
    in_channels: int = 4
    """Channels of the latents, in and out."""
    hidden_size: int = 1152
    """Width of a token; num_heads times a head width that is a multiple of 4."""
    depth: int = 28
    """Number of transformer blocks."""
    num_heads: int = 16
    """Attention heads."""
    num_classes: int | None = 1000
    """Class labels 0..num_classes-1, the null label being num_classes. None: a text model."""
    cap_feat_dim: int | None = None
    """Width of the caption features of a text model. None: a class model."""
    class_dropout_prob: float = 0.1
    """Share of training labels replaced by the null label."""
    new_condition: Condition = "t-r"
    """Times that enter the second time embedding; the first is always that of t."""
    use_new_embed: bool = True
    """Own embedder for the last time of new_condition, instead of the one of t."""
    distance_aware: bool = True
    """Interval-aware attention: the second time embedding also shifts q, k and v."""
    qk_norm: bool = True
    """Layer norm of queries and keys over each head."""
    lora_hidden_size: int | None = None
    """Inner width of the blocks' modulation. None: three quarters of hidden_size."""
    encoder_depth: int = 8
    """Number of the block, from 1, whose output feeds the projection head."""
    z_dim: int | None = None
    """Width of the features the projection head predicts (REPA). None: no head."""
    projector_dim: int = 2048
    """Inner width of the projection head."""
    rope_grid: RopeGrid = "spatial"
    """Token positions on non-square grids: (column, row), or the released code's enumeration."""
    rope_scaling: RopeScaling = "none"
    """Change of the position frequencies on grids larger than those trained on."""
    rope_train_size: int | None = None
    """Tokens of the training images along a side. None: input_size / patch_size."""
    rope_decouple: bool = False
    """Scale each axis by its own side instead of the longer one."""

    def __post_init__(self) -> None:
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads",
                     "encoder_depth", "projector_dim"):  # fmt: skip
            _check_count(name, getattr(self, name))
        for name in ("num_classes", "cap_feat_dim", "lora_hidden_size", "z_dim", "rope_train_size"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if (self.num_classes is None) == (self.cap_feat_dim is None):
            raise ValueError(
                "exactly one of num_classes and cap_feat_dim must be given (the other None), got "
                f"{self.num_classes} and {self.cap_feat_dim}"
            )
        if self.input_size % self.patch_size:
            raise ValueError(
                f"input_size must be a multiple of patch_size {self.patch_size}, "
                f"got {self.input_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads {self.num_heads}, "
                f"got {self.hidden_size}"
            )
        if self.head_dim % 4:
            raise ValueError(
                "hidden_size / num_heads must be a multiple of 4 (pairs of channels for rows and "
                f"columns), got {self.hidden_size} / {self.num_heads} = {self.head_dim}"
            )
        if self.encoder_depth > self.depth and self.z_dim is not None:
            raise ValueError(
                f"encoder_depth must be at most depth {self.depth}, got {self.encoder_depth}"
            )
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must be in [0, 1), got {self.class_dropout_prob}")
        for name, choices in (
            ("new_condition", Condition),
            ("rope_grid", RopeGrid),
            ("rope_scaling", RopeScaling),
        ):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(map(repr, get_args(choices)))
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def from_released(cls, params: Mapping[str, Any]) -> TiMConfig:
        """Configuration from the `network.params` mapping of a released YAML.

        A mapping with `cap_feat_dim` is a text model, any other a class model. Keys that are absent
        take the public implementation's defaults, and `rope_grid` is "released".

        Raises:
            TypeError: not a mapping.
            ValueError: keys unknown to both sides, or a value this network does not implement.
        """
        if not isinstance(params, Mapping):
            raise TypeError(f"params must be a mapping, got {type(params).__name__}")
        values = {**_RELEASED_DEFAULTS, **params}
        for name in _RELEASED_IGNORED:
            values.pop(name, None)
        for name, expected in _RELEASED_CONSTANTS.items():
            value = values.pop(name, expected)
            if value != expected:
                raise ValueError(f"{name} must be {expected}, got {value}")
        if values.get("cap_feat_dim") is not None:
            values.setdefault("num_classes", None)
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TiMConfig:
        """Inverse of `to_dict`; absent fields take their defaults.

        Raises:
            ValueError: unknown keys (all of them are listed) or invalid values.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown model settings: {', '.join(unknown)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as a mapping of plain values, fit for JSON and YAML."""
        return asdict(self)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
