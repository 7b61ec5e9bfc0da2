"""What is measured: operations, their inputs at the sizes of the models, bytes and FLOPs.

Everything that is particular to one operation is in its `Operation` here; the scripts
`benchmarks/bench_NAME.py` and the harness know none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tim import ops

DIRECTIONS = ("forward", "backward", "tangent")
#: Half the width of the central difference in the `dde` variant of transition_loss.
EPSILON = 0.005


@dataclass(frozen=True)
class Size:
    """The tensors that one model's block and objective handle."""

    name: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    mlp: int
    latents: tuple[int, int, int]  #: channels, height, width
    images: int  #: batch of the objective, whose tensors are far smaller than the block's

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def probe(self) -> Size:
        """This size, or one head of one long sequence: float64 stores the N x N matrix."""
        return self if self.tokens <= 1024 else replace(self, batch=1, heads=1)


# Batches of a CPU keep one call of the reference near or under 0.1 s; those of a GPU fill it.
SIZES: dict[str, tuple[Size, ...]] = {
    "cpu": (
        Size("small", 16, 64, 6, 64, 1024, (4, 16, 16), 16),
        Size("b4-256", 8, 64, 12, 64, 2048, (4, 32, 32), 64),
        Size("xl2-256", 2, 256, 16, 72, 3072, (4, 32, 32), 256),
        Size("xl1-512x1024", 1, 512, 16, 72, 3072, (32, 16, 32), 32),
        Size("xl2-512", 1, 1024, 16, 72, 3072, (4, 64, 64), 64),
    ),
    "cuda": (
        Size("b4-256", 256, 64, 12, 64, 2048, (4, 32, 32), 256),
        Size("xl2-256", 128, 256, 16, 72, 3072, (4, 32, 32), 128),
        Size("xl1-512x1024", 32, 512, 16, 72, 3072, (32, 16, 32), 256),
        Size("xl1-1024", 32, 1024, 16, 72, 3072, (32, 32, 32), 128),
        Size("xl2-512", 16, 1024, 16, 72, 3072, (4, 64, 64), 256),
    ),
}
#: Heads of one sample, by sequence length: on a CPU calls of a few milliseconds to a second.
_HEADS = {
    "cpu": {64: 64, 256: 16, 1024: 4, 4096: 1, 16384: 1},
    "cuda": dict.fromkeys((64, 256, 1024, 4096, 16384), 16),
}
#: A few elements: what is timed is the way from Python to the kernel.
FEW = Size("few", 1, 2, 2, 8, 16, (2, 2, 2), 1)
#: Sequence lengths and head widths beyond those of the models, for attention alone.
ATTENTION_SIZES: dict[str, tuple[Size, ...]] = {
    device: tuple(
        Size(f"n{tokens}-d{dim}", max(1, 16384 // tokens) if device == "cuda" else 1, tokens,
             heads, dim, 0, (0, 0, 0), 0)
        for dim in (64, 72, 128)
        for tokens, heads in _HEADS[device].items()
    )
    for device in _HEADS
}  # fmt: skip
#: Few images, for the objective alone: one GPU's share of a batch of large images.
OBJECTIVE_SIZES: dict[str, tuple[Size, ...]] = {
    "cpu": (),
    "cuda": tuple(
        replace(size, name=f"{size.name} x 16", images=16)
        for size in SIZES["cuda"]
        if size.name in ("xl2-256", "xl1-1024")
    ),
}
_OBJECTIVE = ("interpolate", "transition_loss")
#: Longer than this, a size is measured on a CPU only when it is named: seconds for each call.
LONGEST_ON_CPU = 4096

#: Random tensor of a shape: in the dtype under test, or in float32 where that is what the network
#: hands over whatever its dtype.
Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Operation:
    """One operation of `tim.ops` with one way of calling it."""

    name: str
    kernel: str  #: its name in `tim.ops.available()`
    op: Callable
    reference: Callable
    inputs: Callable[[Size, Draw], list[Tensor]]  #: in the order of the arguments
    differentiable: tuple[int, ...] = ()  #: positions of inputs with gradients
    with_tangent: tuple[int, ...] = ()  #: positions of inputs with tangents
    differentiable_outputs: int | None = None  #: that many, from the first; None: all
    #: What a backward pass must read besides the incoming gradients.
    saved: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]] = (
        lambda inputs, outputs: inputs
    )
    #: The reference for float64, where the reference itself would need too much memory.
    exact: Callable | None = None
    #: FLOPs of the matrix products, for operations bound by them.
    flops: Callable[[Size], dict[str, float]] | None = None

    @property
    def directions(self) -> tuple[str, ...]:
        has = {"forward": True, "backward": self.differentiable, "tangent": self.with_tangent}
        return tuple(direction for direction in DIRECTIONS if has[direction])

    def sizes(self, device: str, named: bool = True) -> tuple[Size, ...]:
        """Its sizes on a device; `named`: those too that are measured only when they are named."""
        sizes = SIZES[device]
        if self.kernel == "attention":
            sizes += ATTENTION_SIZES[device]
        elif self.kernel in _OBJECTIVE:
            sizes += OBJECTIVE_SIZES[device]
        if named or device != "cpu":
            return sizes
        return tuple(size for size in sizes if size.tokens <= LONGEST_ON_CPU)


def _modulation(size: Size, draw: Draw, count: int) -> list[Tensor]:
    """Shift, scale, gate as the blocks make them: views into one tensor."""
    return list(draw(size.batch, 1, count * size.hidden).chunk(count, dim=-1))


def _swiglu(size: Size, draw: Draw) -> list[Tensor]:
    shape = (size.batch, size.tokens, size.mlp)
    return [draw(*shape), draw(*shape)]


def _adaln(size: Size, draw: Draw) -> list[Tensor]:
    return [draw(size.batch, size.tokens, size.hidden), *_modulation(size, draw, 2)]


def _gated_adaln(size: Size, draw: Draw) -> list[Tensor]:
    shape = (size.batch, size.tokens, size.hidden)
    return [draw(*shape), draw(*shape), *_modulation(size, draw, 3)]


def _qk_norm_rope(size: Size, draw: Draw) -> list[Tensor]:
    qkv = draw(size.batch, size.tokens, 3, size.heads, size.head_dim)
    parameters = [draw(size.head_dim, wide=True) for _ in range(4)]
    angles = draw(size.tokens, size.head_dim // 2, wide=True).repeat_interleave(2, dim=-1)
    return [qkv, *parameters, angles.cos(), angles.sin()]


def _attention(size: Size, draw: Draw) -> list[Tensor]:
    return [draw(size.batch, size.tokens, size.heads, size.head_dim) for _ in range(3)]


def _attention_in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference for some queries after the other, scores computed again for the backward."""
    parts = [
        checkpoint(ops.attention_reference, rows, k, v, use_reentrant=False)
        if torch.is_grad_enabled()
        else ops.attention_reference(rows, k, v)
        for rows in q.split(1024, dim=1)
    ]
    return torch.cat(parts, dim=1)


def _attention_flops(size: Size) -> dict[str, float]:
    """Two products forward; five backward; six in forward mode, where both share the scores."""
    product = 2.0 * size.batch * size.heads * size.tokens**2 * size.head_dim
    return {"forward": 2 * product, "backward": 5 * product, "tangent": 6 * product}


def _interpolate(size: Size, draw: Draw) -> list[Tensor]:
    shape = (size.images, *size.latents)
    return [draw(*shape), draw(*shape), draw(size.images, 4, wide=True)]


def _transition_loss(terms: int) -> Callable[[Size, Draw], list[Tensor]]:
    """F, `terms` derivatives of half of the batch, and data and weights in float32."""

    def inputs(size: Size, draw: Draw) -> list[Tensor]:
        shape, half = (size.images, *size.latents), size.images - size.images // 2
        F = draw(*shape)
        derivative = [draw(half, *size.latents) for _ in range(terms)]
        x, z = draw(*shape, wide=True), draw(*shape, wide=True)
        coefficients, weight = draw(size.images, 5, wide=True), draw(size.images, wide=True)
        return [F, *derivative, x, z, coefficients, weight.abs()]

    return inputs


def _loss_with_derivative(function: Callable) -> Callable:
    def loss(F, d, x, z, coefficients, weight):
        return tuple(function(F, x, z, coefficients, d, time_weight=weight))

    return loss


def _loss_with_difference(function: Callable) -> Callable:
    def loss(F, ahead, behind, x, z, coefficients, weight):
        return tuple(
            function(
                F, x, z, coefficients, (ahead, behind), epsilon=EPSILON, time_weight=weight
            )
        )  # fmt: skip

    return loss


def _F_and_target(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return inputs[0], outputs[3]


def _q_and_k(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return inputs[0][:, :, :2], *inputs[1:]


OPERATIONS: tuple[Operation, ...] = (
    Operation("interpolate", "interpolate", ops.interpolate, ops.interpolate_reference,
              _interpolate),
    Operation("adaln", "adaln", ops.adaln, ops.adaln_reference, _adaln,
              differentiable=(0, 1, 2), with_tangent=(0, 1, 2)),
    Operation("gated_adaln", "adaln", ops.gated_adaln, ops.gated_adaln_reference, _gated_adaln,
              differentiable=(0, 1, 2, 3, 4), with_tangent=(0, 1, 2, 3, 4)),
    Operation("qk_norm_rope", "qk_norm_rope", ops.qk_norm_rope, ops.qk_norm_rope_reference,
              _qk_norm_rope, differentiable=(0, 1, 2, 3, 4), with_tangent=(0,), saved=_q_and_k),
    Operation("swiglu", "swiglu", ops.swiglu, ops.swiglu_reference, _swiglu,
              differentiable=(0, 1), with_tangent=(0, 1)),
    Operation("attention", "attention", ops.attention, ops.attention_reference, _attention,
              differentiable=(0, 1, 2), with_tangent=(0, 1, 2), exact=_attention_in_rows,
              flops=_attention_flops),
    Operation("transition_loss", "transition_loss", _loss_with_derivative(ops.transition_loss),
              _loss_with_derivative(ops.transition_loss_reference), _transition_loss(1),
              differentiable=(0,), differentiable_outputs=1, saved=_F_and_target),
    Operation("transition_loss_dde", "transition_loss", _loss_with_difference(ops.transition_loss),
              _loss_with_difference(ops.transition_loss_reference), _transition_loss(2),
              differentiable=(0,), differentiable_outputs=1, saved=_F_and_target),
)  # fmt: skip


def operations_of(kernel: str) -> tuple[Operation, ...]:
    """The measured forms of the operation `kernel` of `tim.ops`."""
    found = tuple(operation for operation in OPERATIONS if operation.kernel == kernel)
    if not found:
        known = ", ".join(dict.fromkeys(operation.kernel for operation in OPERATIONS))
        raise ValueError(f"operation must be one of {known}, got {kernel!r}")
    return found
