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
    device = dispatch.plain_device(gate, up)
    if device is None:
        dispatch.check_tensors(gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(
            f"up must have the shape of gate, {list(gate.shape)}, got {list(up.shape)}"
        )
    return _SWIGLU(device, *dispatch.promote(gate, up))


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
    primals, tangents = pairs.split_promoted(gate, up)
    dispatch.check_shape("up", primals[1], primals[0].shape, "that of gate")
    results = _SWIGLU.beside(primals, tangents)
    if results is None:
        return pairs.lift(swiglu_reference, *pairs.join(primals, tangents))
    return Pair(*results)


def _operands(*tensors: Tensor | None) -> list[Tensor | int | None]:
    """Each operand and its row stride, as the kernels take them; None, 0 for an absent one.

    Read in place wherever it is a matrix with unit column stride, as halves of one product are.
    """
    values: list[Tensor | int | None] = []
    for tensor in tensors:
        if tensor is None:
            values += (None, 0)
        elif tensor.is_contiguous():
            values += (tensor, tensor.shape[-1] if tensor.dim() else 1)
        else:
            rows = tensor.reshape(-1, tensor.shape[-1])
            if rows.stride(-1) != 1:
                rows = rows.contiguous()
            values += (rows, rows.stride(0))
    return values


def _size(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns."""
    columns = tensor.shape[-1] if tensor.dim() else 1
    return tensor.numel() // columns, columns


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = dispatch.empty_like(gate)
    _run_forward(gate, up, out)
    return out


def _run_forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    if out.numel():
        operands = _operands(gate, up)
        code = dispatch.DTYPE_CODES[gate.dtype]
        dispatch.launch("swiglu", gate, *operands, out, *_size(gate), code)


def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    d_gate, d_up = torch.empty_like(grad), torch.empty_like(grad)
    if grad.numel():
        operands = _operands(gate, up)
        code = dispatch.DTYPE_CODES[gate.dtype]
        dispatch.launch(
            "swiglu_backward", gate, grad, *operands, d_gate, d_up, *_size(gate), code,
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
        operands = _operands(gate, up, t_gate, t_up)
        code = dispatch.DTYPE_CODES[gate.dtype]
        last = out[first:] if first else out
        dispatch.launch("swiglu_tangent", gate, *operands, last, t_out, *_size(gate), code)
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


_swiglu_backward = dispatch.register(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _backward, _two_like,
)  # fmt: skip
_SWIGLU = dispatch.Operator(
    "swiglu",
    swiglu_reference,
    plain=dispatch.register(
        "swiglu(Tensor gate, Tensor up) -> Tensor",
        _forward, _like, backward=_gradient, setup_context=_setup,
    ),
    pair=dispatch.register(
        "swiglu_tangent(Tensor gate, Tensor up, Tensor? t_gate, Tensor? t_up) -> (Tensor, Tensor)",
        _tangent, _tangent_fake, backward=_gradient, setup_context=_setup,
    ),
    moving=2,
)  # fmt: skip
