"""The training loss of a transition: target, squared and cosine error, weights, in one pass."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F_
from torch import Tensor

from tim.ops import _dispatch as dispatch
from tim.ops._seen import Seen

#: Added to the error before it is inverted into the adaptive weight (value of the released code).
ADAPTIVE_EPS = 1e-5
#: By which of the tensors are absent.
_SEEN: defaultdict[tuple[bool, ...], Seen] = defaultdict(Seen)


class TransitionLossTerms(NamedTuple):
    """Result of `transition_loss`; only `loss` is differentiable, and only with respect to F."""

    loss: Tensor  #: [B], weight * denoising, the weight held constant
    denoising: Tensor  #: [B], squared error, plus the cosine term if asked for
    weight: Tensor  #: [B], time_weight / (denoising + 1e-5)
    target: Tensor  #: [B, C, H, W]


def transition_loss(
    F: Tensor,
    x: Tensor,
    z: Tensor,
    coefficients: Tensor,
    derivative: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    epsilon: float | None = None,
    guidance: tuple[Tensor, Tensor] | None = None,
    time_weight: Tensor | None = None,
    cosine: bool = True,
) -> TransitionLossTerms:
    """Weighted error of F against the target that the transition identity demands.

        target    = c_x x + c_z z + c_d dF + c_cond F_cond + c_null F_null
        denoising = mean((F - target)^2) [+ mean over positions of 1 - cos(F, target) over channels]
        loss      = denoising * time_weight / (denoising + 1e-5)       (the factor held constant)

    Args:
        F: [B, C, H, W], the network's prediction; gradients flow to it alone.
        x, z: [B, C, H, W], clean latents and noise.
        coefficients: [B, 5], the columns c_x, c_z, c_d, c_cond, c_null.
        derivative: dF [B', C, H, W] of the last B' <= B samples (zero for the others), or
            (F_plus, F_minus) of these samples, then dF = (F_plus - F_minus) / (2 epsilon), or None.
        epsilon: half the distance in time between F_plus and F_minus.
        guidance: (F_cond, F_null), each [B, C, H, W], or None.
        time_weight: [B], ones when None.
        cosine: adds the cosine term.

    Returns:
        TransitionLossTerms. loss, denoising and weight are float32 (float64 for float64 inputs);
        target has the wider dtype of F and x.

    Raises:
        TypeError: an input is no floating-point tensor.
        ValueError: shapes or devices differ from the above, or epsilon is missing or not positive.
        NotImplementedError: an input carries a forward-mode tangent (the operation has no rule).

    Source: TiM (arXiv 2509.04394), the transition identity and its objective in sec. 3; the
    coefficients of each transport are those of `tim.transports`.
    """
    given = (F, x, z, coefficients, *_terms(derivative, guidance), time_weight)
    if given[5] is not None and (epsilon is None or not epsilon > 0):
        raise ValueError(f"epsilon must be positive with (F_plus, F_minus), got {epsilon}")
    present = [tensor for tensor in given if tensor is not None]
    seen = _SEEN[tuple([tensor is None for tensor in given])]
    device = seen.recall(*present)
    if device is None:
        device = _check(*given)
        dispatch.refuse_tangents("transition_loss", *given)
        taken = _taken(*given)
        if all(map(operator.is_, taken, given)):
            seen.note(device, *present)
        given = taken
    *tensors, time_weight = given
    if time_weight is None:
        time_weight = torch.ones(F.shape[0], device=F.device)
    epsilon = 0.0 if tensors[5] is None else epsilon
    results = _TRANSITION_LOSS(device, *tensors, time_weight, epsilon, cosine)
    return TransitionLossTerms(*results)


def _no_kernel_for(F: Tensor, x: Tensor, *_: object) -> str | None:
    if x.dtype not in (F.dtype, torch.float32):
        return f"latents of {x.dtype} beside a prediction of {F.dtype}"
    return None


def transition_loss_reference(
    F: Tensor,
    x: Tensor,
    z: Tensor,
    coefficients: Tensor,
    derivative: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    epsilon: float | None = None,
    guidance: tuple[Tensor, Tensor] | None = None,
    time_weight: Tensor | None = None,
    cosine: bool = True,
) -> TransitionLossTerms:
    """The specification, in PyTorch operations."""
    with dispatch.reference_only():
        return transition_loss(
            F, x, z, coefficients, derivative,
            epsilon=epsilon, guidance=guidance, time_weight=time_weight, cosine=cosine,
        )  # fmt: skip


def _terms(derivative, guidance) -> tuple[Tensor | None, ...]:
    """d, d_minus, F_cond, F_null."""
    d, d_minus = derivative if isinstance(derivative, tuple) else (derivative, None)
    cond, null = (None, None) if guidance is None else guidance
    return d, d_minus, cond, null


def _taken(F: Tensor, x: Tensor, z: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """All inputs in the dtypes in which the operation takes them, no gradient but F's."""
    coefficients, *terms, time_weight = others
    data = torch.promote_types(torch.promote_types(F.dtype, x.dtype), z.dtype)
    x, z = x.to(data), z.to(data)
    terms = [None if term is None else term.to(F.dtype) for term in terms]
    constants = (x, z, coefficients, *terms, time_weight)
    return F, *[
        tensor.detach() if tensor is not None and tensor.requires_grad else tensor
        for tensor in constants
    ]


def _check(
    F: Tensor,
    x: Tensor,
    z: Tensor,
    coefficients: Tensor,
    d: Tensor | None,
    d_minus: Tensor | None,
    cond: Tensor | None,
    null: Tensor | None,
    time_weight: Tensor | None,
) -> str | None:
    """Raises what the docstring promises; returns `plain_device` of the tensors."""
    names = ("F", "x", "z", "coefficients", "derivative", "F_minus", "F_cond", "F_null")
    tensors = (F, x, z, coefficients, d, d_minus, cond, null, time_weight)
    device = dispatch.plain_device(*[tensor for tensor in tensors if tensor is not None])
    if device is None:
        named = zip((*names, "time_weight"), tensors, strict=True)
        dispatch.check_tensors(**{n: tensor for n, tensor in named if tensor is not None})
    shape = F.shape
    if len(shape) != 4:
        raise ValueError(f"F must have shape [B, C, H, W], got {list(shape)}")
    for name, tensor in (("x", x), ("z", z), ("F_cond", cond), ("F_null", null)):
        if tensor is not None and tensor.shape != shape:
            dispatch.check_shape(name, tensor, shape, "[B, C, H, W]")
    dispatch.check_shape("coefficients", coefficients, (shape[0], 5), "[B, 5]")
    if time_weight is not None:
        dispatch.check_shape("time_weight", time_weight, shape[:1], "[B]")
    if d is not None and (d.shape[1:] != shape[1:] or d.shape[0] > shape[0]):
        raise ValueError(
            f"derivative must have shape [B', C, H, W] with B' <= B and the rest of F, "
            f"{list(shape)}, got {list(d.shape)}"
        )
    if d_minus is not None:
        dispatch.check_shape("F_minus", d_minus, d.shape, "that of F_plus")
    return device


def _error(F: Tensor, target: Tensor, cosine: bool) -> Tensor:
    """denoising [B], in the dtype of target."""
    F = F.to(target.dtype)
    error = (F - target).square().mean(dim=(1, 2, 3))
    if cosine:
        error = error + (1 - F_.cosine_similarity(F, target, dim=1)).mean(dim=(1, 2))
    return error


def _reference(
    F, x, z, coefficients, d, d_minus, cond, null, time_weight, epsilon, cosine
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    c_x, c_z, c_d, c_cond, c_null = coefficients.unbind(1)
    if d_minus is not None:
        c_d = c_d / (2 * epsilon)

    def times(column: Tensor, term: Tensor) -> Tensor:
        return column.to(wide)[F.shape[0] - term.shape[0] :, None, None, None] * term.to(wide)

    target = times(c_x, x) + times(c_z, z)
    for column, term in ((c_d, d), (-c_d, d_minus), (c_cond, cond), (c_null, null)):
        if term is not None:
            part = times(column, term)
            first = F.shape[0] - term.shape[0]
            target = torch.cat((target[:first], target[first:] + part)) if first else target + part
    target = target.to(x.dtype)
    denoising = _error(F, target.to(wide), cosine)
    weight = time_weight.to(wide) / (denoising.detach() + ADAPTIVE_EPS)
    return weight * denoising, denoising.detach(), weight, target


def _first(F: Tensor, d: Tensor | None) -> int:
    return F.shape[0] if d is None else F.shape[0] - d.shape[0]


def _geometry(F: Tensor) -> tuple[int, int, int]:
    batch, channels, height, width = F.shape
    return batch, channels, height * width


def parts(batch: int, positions: int) -> int:
    """How many blocks of a GPU share a sample, by the shape alone.

    So every GPU adds in the same order. 128 samples and more take one block each.
    """
    return 1 if batch >= 128 else max(1, min(256 // batch, positions // 128))


def _codes(F: Tensor, data: Tensor) -> tuple[int, int]:
    return dispatch.DTYPE_CODES[F.dtype], dispatch.DTYPE_CODES[data.dtype]


def _forward(
    F, x, z, coefficients, d, d_minus, cond, null, time_weight, epsilon, cosine
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arrays = [
        None if tensor is None else tensor.contiguous()
        for tensor in (F, x, z, d, d_minus, cond, null)
    ]
    table, time_weight = dispatch.float32(coefficients), dispatch.float32(time_weight)
    target = torch.empty_like(arrays[1])
    loss, denoising = torch.empty_like(time_weight), torch.empty_like(time_weight)
    weight = torch.empty_like(time_weight)
    if F.numel():
        outputs = (target, loss, denoising, weight)
        batch, _, positions = _geometry(F)
        count = parts(batch, positions) if F.device.type in dispatch.WITH_SCRATCH else 1
        shape = (batch, count, 2)
        sums = None if count == 1 else torch.empty(shape, dtype=torch.float32, device=F.device)
        dispatch.launch(
            "transition_loss", F, *arrays, table, epsilon, time_weight, _first(F, d), *outputs,
            sums, *_geometry(F), count, cosine, *_codes(F, x),
        )  # fmt: skip
    else:  # the mean over no elements
        for output in (loss, denoising, weight):
            output.fill_(math.nan)
    return loss, denoising, weight, target


def _fake(
    F, x, z, coefficients, d, d_minus, cond, null, time_weight, epsilon, cosine
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, denoising, weight = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(3))
    return loss, denoising, weight, dispatch.empty_like(x)


def _backward(scale: Tensor, F: Tensor, target: Tensor, cosine: bool) -> Tensor:
    scale, F = dispatch.float32(scale), F.contiguous()
    gradient = dispatch.empty_like(F)
    if F.numel():
        dispatch.launch(
            "transition_loss_backward", F, scale, F, target, gradient,
            *_geometry(F), cosine, *_codes(F, target),
        )  # fmt: skip
    return gradient


def _backward_fake(scale: Tensor, F: Tensor, target: Tensor, cosine: bool) -> Tensor:
    return dispatch.empty_like(F)


def _setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, denoising, weight, target = output
    ctx.save_for_backward(inputs[0], weight, target)
    ctx.cosine = inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(denoising, weight, target)


def _gradient(ctx, g_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if g_loss is None:
        return (None,) * 11
    F, weight, target = ctx.saved_tensors
    dispatch.refuse_tangents("the backward of transition_loss", g_loss, F)
    gradient = _transition_loss_backward(g_loss * weight, F, target, ctx.cosine)
    return (gradient, *(None,) * 10)


_transition_loss_backward = dispatch.register(
    "transition_loss_backward(Tensor scale, Tensor F, Tensor target, bool cosine) -> Tensor",
    _backward, _backward_fake,
)  # fmt: skip
_TRANSITION_LOSS = dispatch.Operator(
    "transition_loss",
    _reference,
    plain=dispatch.register(
        "transition_loss(Tensor F, Tensor x, Tensor z, Tensor coefficients, Tensor? d, "
        "Tensor? d_minus, Tensor? cond, Tensor? null, Tensor time_weight, float epsilon, "
        "bool cosine) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        _forward, _fake, backward=_gradient, setup_context=_setup,
    ),
    outputs=4,
    refuses=_no_kernel_for,
)  # fmt: skip
