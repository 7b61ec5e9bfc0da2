"""SwiGLU gate: the nonlinearity of every MLP and modulation of the TiM network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tim.ops import _dispatch as dispatch
from tim.ops import pairs
from tim.ops.pairs import Operand, Pair


def swiglu(gate: Operand, up: Operand) -> Operand:
    """silu(gate) * up, with silu(a) = a / (1 + exp(-a)).

    Args:
        gate, up: [..., M], same shape; any floating dtype, promoted to their common one.

    Returns:
        [..., M], contiguous. Its forward-mode tangent is not differentiable.

    Raises:
        TypeError: an input is no floating-point tensor.
        ValueError: shapes or devices differ.

    Source: Shazeer, "GLU variants improve Transformer" (arXiv 2002.05202), eq. 5.
    """
    if pairs.is_pair(gate, up):
        return _swiglu_of_pairs(gate, up)
    dispatch.check_tensors(gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(
            f"up must have the shape of gate, {list(gate.shape)}, got {list(up.shape)}"
        )
    gate, up = dispatch.promote(gate, up)
    if dispatch.why_not("swiglu", gate, up) is not None:
        return dispatch.drop_tangent_graph(swiglu_reference(gate, up))
    (gate, up), tangents = dispatch.split_tangents(gate, up)
    if tangents is None:
        return _swiglu(gate, up)
    return dispatch.make_dual(*_swiglu_tangent(gate, up, *tangents))


def silu(x: Operand) -> Operand:
    """x / (1 + exp(-x)), PyTorch's, of a Pair too."""
    if not isinstance(x, Pair):
        return F.silu(x)
    primal, tangent = x
    with torch.no_grad():
        # The derivative is a factor for each element, so the backward formula is the tangent's.
        t_out = torch.ops.aten.silu_backward(tangent, primal[len(primal) - len(tangent) :])
    return Pair(F.silu(primal), t_out)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification, in PyTorch operations."""
    return (F.silu(gate) * up).contiguous()


def _swiglu_of_pairs(gate: Operand, up: Operand) -> Pair:
    operands = pairs.promote(gate, up)
    primals, tangents = pairs.split(*operands)
    dispatch.check_shape("up", primals[1], primals[0].shape, "that of gate")
    if dispatch.why_not("swiglu", *primals) is not None:
        return pairs.lift(swiglu_reference, *operands)
    return Pair(*_swiglu_tangent(*primals, *tangents))


def _rows(tensor: Tensor | None) -> Tensor | None:
    """[rows, M] view with unit column stride; copies only where no such view exists."""
    if tensor is None:
        return None
    if tensor.dim() == 2:
        rows = tensor
    else:
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _operands(*rows: Tensor | None) -> tuple[int, ...]:
    """Pointer and row stride of each operand, as the kernels take them; 0, 0 for an absent one."""
    return tuple(
        value
        for row in rows
        for value in ((0, 0) if row is None else (row.data_ptr(), row.stride(0)))
    )


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = dispatch.empty_like(gate)
    _run_forward(gate, up, out)
    return out


def _run_forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    if out.numel():
        g, u = _rows(gate), _rows(up)
        code = dispatch.DTYPE_CODES[gate.dtype]
        dispatch.launch("swiglu", gate, *_operands(g, u), out.data_ptr(), *g.shape, code)


def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    d_gate, d_up = torch.empty_like(grad), torch.empty_like(grad)
    if grad.numel():
        g, u = _rows(gate), _rows(up)
        code = dispatch.DTYPE_CODES[gate.dtype]
        dispatch.launch(
            "swiglu_backward", gate, grad.data_ptr(), *_operands(g, u),
            d_gate.data_ptr(), d_up.data_ptr(), *g.shape, code,
        )  # fmt: skip
    return d_gate, d_up


def _tangent(
    gate: Tensor, up: Tensor, t_gate: Tensor | None, t_up: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tangents may be of the last samples alone."""
    out = dispatch.empty_like(gate)
    first = _first(gate, t_gate, t_up)
    if first:
        _run_forward(gate[:first], up[:first], out[:first])
        gate, up = gate[first:], up[first:]
    t_out = dispatch.empty_like(gate)
    if t_out.numel():
        operands = [_rows(tensor) for tensor in (gate, up, t_gate, t_up)]
        code = dispatch.DTYPE_CODES[gate.dtype]
        dispatch.launch(
            "swiglu_tangent", gate, *_operands(*operands),
            out[first:].data_ptr() if first else out.data_ptr(), t_out.data_ptr(),
            *operands[0].shape, code,
        )  # fmt: skip
    return out, t_out


def _first(gate: Tensor, *tangents: Tensor | None) -> int:
    """Number of samples without tangents, which come first; gates may be scalars."""
    return len(gate) - pairs.count(tangents) if gate.dim() else 0


def _setup(ctx, inputs: tuple, output: Tensor | tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.set_materialize_grads(False)
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    gate, up = ctx.saved_tensors
    dispatch.refuse_tangents("the backward of swiglu", grad, gate, up)
    gradients = _swiglu_backward(grad, gate, up)
    return (*gradients, None, None)[: len(ctx.needs_input_grad)]


def _like(tensor: Tensor, *_: Tensor | None) -> Tensor:
    return dispatch.empty_like(tensor)


def _two_like(grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return _like(grad), _like(grad)


def _tangent_fake(gate: Tensor, up: Tensor, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
    first = _first(gate, *tangents)
    return _like(gate), _like(gate[first:] if first else gate)


_swiglu = dispatch.register(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    _forward, _like, backward=_gradient, setup_context=_setup,
)  # fmt: skip
_swiglu_tangent = dispatch.register(
    "swiglu_tangent(Tensor gate, Tensor up, Tensor? t_gate, Tensor? t_up) -> (Tensor, Tensor)",
    _tangent, _tangent_fake, backward=_gradient, setup_context=_setup,
)  # fmt: skip
_swiglu_backward = dispatch.register(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _backward, _two_like,
)  # fmt: skip
