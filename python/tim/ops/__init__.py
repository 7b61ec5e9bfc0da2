"""Operations of the TiM network and objective: forward, backward and forward-mode tangent.

Every public function picks a compiled kernel where one covers its inputs and runs its PyTorch
reference otherwise; `torch.func.jvp`, autograd, autocast and `torch.compile` work through all of
them. Tangents are exact but not themselves differentiable: they keep no autograd graph.
The operations registered under `torch.ops.tim` are private: called bare, they have no tangent.
"""

from tim.ops._overview import Entry, overview
from tim.ops._table import (
    DEVICES,
    KERNEL_OPS,
    MEASURED,
    backends,
    in_force,
    kernels,
    reference_only,
)
from tim.ops.adaln import adaln, adaln_reference, gated_adaln, gated_adaln_reference
from tim.ops.attention import attention, attention_reference
from tim.ops.grouped_linear import grouped_linear, grouped_linear_reference
from tim.ops.interpolate import interpolate, interpolate_reference
from tim.ops.linear import linear
from tim.ops.pairs import Operand, Pair
from tim.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference, rotate_reference
from tim.ops.swiglu import silu, swiglu, swiglu_reference
from tim.ops.transition_loss import (
    TransitionLossTerms,
    transition_loss,
    transition_loss_reference,
)

__all__ = [
    "DEVICES",
    "KERNEL_OPS",
    "MEASURED",
    "Entry",
    "Operand",
    "Pair",
    "TransitionLossTerms",
    "adaln",
    "adaln_reference",
    "attention",
    "attention_reference",
    "available",
    "gated_adaln",
    "gated_adaln_reference",
    "grouped_linear",
    "grouped_linear_reference",
    "in_force",
    "interpolate",
    "interpolate_reference",
    "kernels",
    "linear",
    "overview",
    "qk_norm_rope",
    "qk_norm_rope_reference",
    "reference_only",
    "rotate_reference",
    "silu",
    "swiglu",
    "swiglu_reference",
    "transition_loss",
    "transition_loss_reference",
]


def available() -> dict[str, tuple[str, ...]]:
    """Which operations have compiled kernels here: {"swiglu": ("cpu", "cuda"), ...}."""
    return {name: backends(name) for name in KERNEL_OPS}
