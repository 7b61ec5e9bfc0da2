"""Adaptive layer norm, plain and behind the gated residual that precedes it in every block."""

from __future__ import annotations

import torch
from torch import Tensor

from tim.ops import _dispatch as dispatch
from tim.ops import pairs
from tim.ops._seen import Seen
from tim.ops.pairs import Operand, Pair

_SEEN, _GATED_SEEN = Seen(), Seen()


def adaln(x: Operand, shift: Operand, scale: Operand, eps: float = 1e-6) -> Operand:
    """norm(x) (1 + scale) + shift, with norm the layer norm over C without parameters.

    Args:
        x: [B, N, C] tokens.
        shift, scale: [B, 1, C], per sample, broadcast over the tokens; any batch stride.
        eps: added to the variance.

    Returns:
        [B, N, C], contiguous, in the common dtype of the inputs. Its forward-mode tangent is not
        differentiable.

    Raises:
        TypeError: an input is no dense floating-point tensor, or eps no number.
        ValueError: shapes or devices differ from the above, or eps is negative.

    Source: Peebles and Xie, "Scalable diffusion models with transformers" (arXiv 2212.09748),
    sec. 3.2.
    """
    dispatch.check_eps(eps)
    if pairs.is_pair(x, shift, scale):
        return _adaln_of_pairs(x, shift, scale, eps)
    device = _SEEN.recall(x, shift, scale)
    if device is None:
        device = dispatch.plain_device(x, shift, scale)
        if device is None:
            dispatch.check_tensors(x=x, shift=shift, scale=scale)
        _check_modulation(x, shift=shift, scale=scale)
        _SEEN.note(device, x, shift, scale)
    return _ADALN(device, *dispatch.promote(x, shift, scale), eps)


def gated_adaln(
    x: Operand, y: Operand, gate: Operand, shift: Operand, scale: Operand, eps: float = 1e-6
) -> tuple[Operand, Operand]:
    """h = x + gate y, and adaln(h, shift, scale), in one pass.

    Args:
        x, y: [B, N, C], residual stream and the output of the sub-layer that is added to it.
        gate, shift, scale: [B, 1, C], per sample, broadcast over the tokens; any batch stride.
        eps: added to the variance.

    Returns:
        h and its adaptive norm, both [B, N, C], contiguous, in the common dtype of the inputs.
        Their forward-mode tangents are not differentiable.

    Raises:
        TypeError: an input is no dense floating-point tensor, or eps no number.
        ValueError: shapes or devices differ from the above, or eps is negative.

    Source: as `adaln`; the gate is that of adaLN-Zero.
    """
    dispatch.check_eps(eps)
    if pairs.is_pair(x, y, gate, shift, scale):
        return _gated_adaln_of_pairs(x, y, gate, shift, scale, eps)
    device = _GATED_SEEN.recall(x, y, gate, shift, scale)
    if device is None:
        device = dispatch.plain_device(x, y, gate, shift, scale)
        if device is None:
            dispatch.check_tensors(x=x, y=y, gate=gate, shift=shift, scale=scale)
        _check_modulation(x, gate=gate, shift=shift, scale=scale)
        dispatch.check_shape("y", y, x.shape, "that of x")
        _GATED_SEEN.note(device, x, y, gate, shift, scale)
    return _GATED_ADALN(device, *dispatch.promote(x, y, gate, shift, scale), eps)


def adaln_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """The specification, in PyTorch operations."""
    return dispatch.layer_norm(x, eps) * (1 + scale) + shift


def gated_adaln_reference(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The specification, in PyTorch operations."""
    h = x + gate * y
    return h, adaln_reference(h, shift, scale, eps)


def _adaln_of_pairs(x: Operand, shift: Operand, scale: Operand, eps: float) -> Pair:
    primals, tangents = pairs.split_promoted(x, shift, scale)
    _check_modulation(primals[0], shift=primals[1], scale=primals[2])
    results = _ADALN.beside(primals, tangents, eps)
    if results is None:
        operands = pairs.join(primals, tangents)
        return pairs.lift(lambda *inputs: adaln_reference(*inputs, eps), *operands)
    return Pair(*results[:2])


def _gated_adaln_of_pairs(
    x: Operand, y: Operand, gate: Operand, shift: Operand, scale: Operand, eps: float
) -> tuple[Pair, Pair]:
    primals, tangents = pairs.split_promoted(x, y, gate, shift, scale)
    _check_modulation(primals[0], gate=primals[2], shift=primals[3], scale=primals[4])
    dispatch.check_shape("y", primals[1], primals[0].shape, "that of x")
    results = _GATED_ADALN.beside(primals, tangents, eps)
    if results is None:
        operands = pairs.join(primals, tangents)
        return pairs.lift(lambda *inputs: gated_adaln_reference(*inputs, eps), *operands)
    h, out, t_h, t_out, _, _ = results
    return Pair(h, t_h), Pair(out, t_out)


def _check_modulation(x: Tensor, **modulation: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must have shape [B, N, C], got {list(x.shape)}")
    batch, _, channels = x.shape
    for name, tensor in modulation.items():
        dispatch.check_shape(name, tensor, (batch, 1, channels), "[B, 1, C]")


def _rows(tensor: Tensor | None) -> Tensor | None:
    """The modulation with unit channel stride, as a view (any batch stride) where it already is."""
    if tensor is None or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _row_statistics(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)


def _forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _run_forward(x, None, None, shift, scale, eps)[1:]


def _forward_alone(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _run_forward(x, None, None, shift, scale, eps, statistics=False)[1]


def _gated_forward(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run_forward(x, y, gate, shift, scale, eps)


def _gated_forward_alone(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _run_forward(x, y, gate, shift, scale, eps, statistics=False)[:2]


def _run_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    statistics: bool = True,
) -> tuple:
    x, y = x.contiguous(), _contiguous(y)
    gate, shift, scale = _rows(gate), _rows(shift), _rows(scale)
    h = None if y is None else torch.empty_like(x)
    out = torch.empty_like(x)
    mean, rstd = (_row_statistics(x), _row_statistics(x)) if statistics else (None, None)
    if x.numel():
        dispatch.launch(
            "adaln", x, x, y, gate, shift, scale, h, out, mean, rstd, *x.shape,
            *map(_stride, (gate, shift, scale)), eps, dispatch.DTYPE_CODES[x.dtype],
        )  # fmt: skip
    return h, out, mean, rstd


def _tangent(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    t_x: Tensor | None,
    t_shift: Tensor | None,
    t_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    primals, tangents = (x, None, None, shift, scale), (t_x, None, None, t_shift, t_scale)
    _, out, _, t_out, mean, rstd = _run_tangent(primals, tangents, eps)
    return out, t_out, mean, rstd


def _gated_tangent(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    t_x: Tensor | None,
    t_y: Tensor | None,
    t_gate: Tensor | None,
    t_shift: Tensor | None,
    t_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    primals, tangents = (x, y, gate, shift, scale), (t_x, t_y, t_gate, t_shift, t_scale)
    h, out, t_h, t_out, mean, rstd = _run_tangent(primals, tangents, eps)
    return h, out, t_h, t_out, mean, rstd


def _run_tangent(primals: tuple, tangents: tuple, eps: float) -> tuple:
    """h, out, t_h, t_out, mean, rstd; tangents may be of the last samples alone."""
    x, y, gate, shift, scale = primals
    t_x, t_y, t_gate, t_shift, t_scale = tangents
    x, y, t_x, t_y = x.contiguous(), _contiguous(y), _contiguous(t_x), _contiguous(t_y)
    primals = (x, y, _rows(gate), _rows(shift), _rows(scale))
    tangents = (t_x, t_y, _rows(t_gate), _rows(t_shift), _rows(t_scale))
    first = x.shape[0] - pairs.count(tangents)
    moving = x[first:] if first else x
    h = None if y is None else torch.empty_like(x)
    out, mean, rstd = torch.empty_like(x), _row_statistics(x), _row_statistics(x)
    t_h, t_out = None if y is None else torch.empty_like(moving), torch.empty_like(moving)
    outputs = (h, out, mean, rstd)
    if first:
        samples = slice(0, first)
        _launch("adaln", _part(primals, samples), (), _part(outputs, samples), (), eps)
        primals, outputs = _part(primals, slice(first, None)), _part(outputs, slice(first, None))
    _launch("adaln_tangent", primals, tangents, outputs, (t_h, t_out), eps)
    return h, out, t_h, t_out, mean, rstd


def _part(tensors: tuple, samples: slice) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor[samples] for tensor in tensors)


def _launch(
    name: str, primals: tuple, tangents: tuple, outputs: tuple, t_outputs: tuple, eps: float
) -> None:
    """Call a kernel with inputs, outputs (h, out, mean, rstd) and tangents of the first two."""
    x = primals[0]
    if x.numel():
        dispatch.launch(
            name, x, *primals, *tangents, *outputs[:2], *t_outputs, *outputs[2:], *x.shape,
            *map(_stride, primals[2:]), *map(_stride, tangents[2:]), eps,
            dispatch.DTYPE_CODES[x.dtype],
        )  # fmt: skip


def _backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, _, _, d_shift, d_scale = _run_backward(grad, None, x, None, None, scale, mean, rstd, eps)
    return d_x, d_shift, d_scale


def _gated_backward(
    grad: Tensor,
    grad_h: Tensor,
    h: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _run_backward(grad, grad_h, h, y, gate, scale, mean, rstd, eps)


def _run_backward(
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
) -> tuple:
    grad, grad_h, h, y = map(_contiguous, (grad, grad_h, h, y))
    gate, scale = _rows(gate), _rows(scale)
    d_x, d_y = dispatch.empty_like(h), None if y is None else dispatch.empty_like(h)
    modulation = (h.shape[0], 1, h.shape[2])
    make = torch.empty if h.numel() else torch.zeros
    d_gate, d_shift, d_scale = (
        None if like is None else make(modulation, dtype=h.dtype, device=h.device)
        for like in (gate, scale, scale)
    )
    if h.numel():
        results = (d_x, d_y, d_gate, d_shift, d_scale)
        sums = _sums_of_chunks(h, 2 if gate is None else 3)
        dispatch.launch(
            "adaln_backward", h, grad, grad_h, h, y, gate, scale, mean, rstd, *results, sums,
            *h.shape, 0 if sums is None else sums.shape[1],
            *map(_stride, (gate, scale)), eps, dispatch.DTYPE_CODES[h.dtype],
        )  # fmt: skip
    return d_x, d_y, d_gate, d_shift, d_scale


def _sums_of_chunks(h: Tensor, count: int) -> Tensor | None:
    """Memory in which a GPU keeps the sums over the tokens of each chunk, [B, chunks, count, C]."""
    if h.device.type not in dispatch.WITH_SCRATCH:
        return None
    batch, tokens, channels = h.shape
    shape = (batch, _chunks(batch, tokens), count, channels)
    return torch.empty(shape, dtype=torch.float32, device=h.device)


def _chunks(batch: int, tokens: int) -> int:
    """Into how many chunks the tokens of a sample are cut, by the shape alone.

    So every GPU adds in the same order. About 1000 chunks fill any of them several times; more only
    add traffic, as the sums are written and read once, in float32.
    """
    return -(-tokens // min(max(batch * tokens // 1024, 8), 64))


def _setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, *auxiliary = output
    mean, rstd = output[-2:]
    ctx.save_for_backward(inputs[0], inputs[2], mean, rstd)
    ctx.eps = inputs[-1]
    ctx.mark_non_differentiable(*auxiliary)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    count = len(ctx.needs_input_grad)
    if grad is None:
        return (None,) * count
    x, scale, mean, rstd = ctx.saved_tensors
    dispatch.refuse_tangents("the backward of adaln", grad, x, scale)
    d_x, d_shift, d_scale = _adaln_backward(grad, x, scale, mean, rstd, ctx.eps)
    return (d_x, d_shift, d_scale, *(None,) * (count - 3))


def _gated_setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    h, _, *auxiliary = output
    mean, rstd = output[-2:]
    ctx.save_for_backward(h, inputs[1], inputs[2], inputs[4], mean, rstd)
    ctx.eps = inputs[-1]
    ctx.mark_non_differentiable(*auxiliary)
    ctx.set_materialize_grads(False)


def _gated_gradient(
    ctx, grad_h: Tensor | None, grad: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    count = len(ctx.needs_input_grad)
    if grad is None and grad_h is None:
        return (None,) * count
    h, y, gate, scale, mean, rstd = ctx.saved_tensors
    grad = torch.zeros_like(h) if grad is None else grad
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h
    dispatch.refuse_tangents("the backward of gated_adaln", grad_h, grad, h)
    gradients = _gated_adaln_backward(grad, grad_h, h, y, gate, scale, mean, rstd, ctx.eps)
    return (*gradients, *(None,) * (count - 5))


def _fake(x: Tensor, *_: object) -> tuple[Tensor, ...]:
    return dispatch.empty_like(x), _row_statistics(x), _row_statistics(x)


def _gated_fake(x: Tensor, *others: object) -> tuple[Tensor, ...]:
    return dispatch.empty_like(x), *_fake(x)


def _tangent_fake(x: Tensor, *others: object) -> tuple[Tensor, ...]:
    size = pairs.count(others[2:5])
    out, mean, rstd = _fake(x)
    return out, dispatch.empty_like(x[len(x) - size :]), mean, rstd


def _gated_tangent_fake(x: Tensor, *others: object) -> tuple[Tensor, ...]:
    tail = x[len(x) - pairs.count(others[4:9]) :]
    h, out, mean, rstd = _gated_fake(x)
    return h, out, dispatch.empty_like(tail), dispatch.empty_like(tail), mean, rstd


def _backward_fake(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    modulation = x.new_empty((x.shape[0], 1, x.shape[2]))
    return dispatch.empty_like(x), modulation, torch.empty_like(modulation)


def _gated_backward_fake(grad: Tensor, grad_h: Tensor, h: Tensor, *_: object) -> tuple[Tensor, ...]:
    modulation = (h.shape[0], 1, h.shape[2])
    return (
        dispatch.empty_like(h),
        dispatch.empty_like(h),
        *(h.new_empty(modulation) for _ in range(3)),
    )


_adaln_backward = dispatch.register(
    "adaln_backward(Tensor grad, Tensor x, Tensor scale, Tensor mean, Tensor rstd, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip
_gated_adaln_backward = dispatch.register(
    "gated_adaln_backward(Tensor grad, Tensor grad_h, Tensor h, Tensor y, Tensor gate, "
    "Tensor scale, Tensor mean, Tensor rstd, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gated_backward, _gated_backward_fake,
)  # fmt: skip
_ADALN = dispatch.Operator(
    "adaln",
    adaln_reference,
    plain=dispatch.register(
        "adaln(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
        _forward, _fake, backward=_gradient, setup_context=_setup,
    ),
    pair=dispatch.register(
        "adaln_tangent(Tensor x, Tensor shift, Tensor scale, Tensor? t_x, Tensor? t_shift, "
        "Tensor? t_scale, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
        _tangent, _tangent_fake, backward=_gradient, setup_context=_setup,
    ),
    moving=3,
    alone=_forward_alone,
)  # fmt: skip
_GATED_ADALN = dispatch.Operator(
    "adaln",
    gated_adaln_reference,
    plain=dispatch.register(
        "gated_adaln(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        _gated_forward, _gated_fake, backward=_gated_gradient, setup_context=_gated_setup,
    ),
    pair=dispatch.register(
        "gated_adaln_tangent(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, "
        "Tensor? t_x, Tensor? t_y, Tensor? t_gate, Tensor? t_shift, Tensor? t_scale, float eps) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _gated_tangent, _gated_tangent_fake, backward=_gated_gradient, setup_context=_gated_setup,
    ),
    outputs=2,
    moving=5,
    alone=_gated_forward_alone,
)  # fmt: skip
