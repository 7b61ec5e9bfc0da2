"""Several linear layers of one shape, of all blocks of a network say, as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import TransformType

from tim.ops import _dispatch as dispatch
from tim.ops import pairs
from tim.ops.linear import linear
from tim.ops.pairs import Operand, Pair


def grouped_linear(
    x: Operand, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
) -> Operand:
    """x_g W_g^T + b_g for every group g: one product, of values and tangents together.

    For few rows, vectors for each sample, where products wait for the weights and for their own
    launches. On a GPU the weights are gathered for it; a CPU has no launches to save and reads each
    where it is.

    Args:
        x: [B, K], the same for all groups, or [B, G, K]; or a Pair of that.
        weights: G of [M, K].
        biases: G of [M], or None.

    Returns:
        [B, G, M], in the dtype that PyTorch's linear layers would give. Its forward-mode tangent is
        not differentiable.

    Raises:
        ValueError: shapes differ from the above.
    """
    biases = [] if biases is None else list(biases)
    weights = list(weights)
    _check(x.primal if isinstance(x, Pair) else x, weights, biases)
    device = weights[0].device.type
    if pairs.is_pair(x):
        dispatch.refuse_tangents("grouped_linear of a Pair", *weights, *biases)
        primal, tangent = x
        if _runs_reference(device):
            with torch.no_grad():
                t_out = grouped_linear_reference(tangent, weights)
            return Pair(grouped_linear_reference(primal, weights, biases), t_out)
        dtype = dispatch.product_dtype(weights[0])
        return Pair(*_grouped_linear_tangent(primal, tangent, weights, biases, dtype))
    if _runs_reference(device) or dispatch.split_tangents(x, *weights, *biases)[1] is not None:
        return grouped_linear_reference(x, weights, biases)
    return _grouped_linear(x, weights, biases, dispatch.product_dtype(weights[0]))


def grouped_linear_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
) -> Tensor:
    """The specification, in PyTorch operations."""
    inputs = [x] * len(weights) if x.dim() == 2 else x.unbind(1)
    outputs = [
        linear(group, weight, biases[i] if biases else None)
        for i, (group, weight) in enumerate(zip(inputs, weights, strict=True))
    ]
    return torch.stack(outputs, dim=1)


def _check(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> None:
    if not weights:
        raise ValueError("weights must not be empty")
    rows, columns = weights[0].shape
    for weight in weights:
        dispatch.check_shape("weights", weight, (rows, columns), "[M, K], all alike,")
    if biases and len(biases) != len(weights):
        raise ValueError(f"biases must be as many as weights, {len(weights)}, got {len(biases)}")
    for bias in biases:
        dispatch.check_shape("biases", bias, (rows,), "[M]")
    groups = (len(weights),) if x.dim() == 3 else ()
    dispatch.check_shape("x", x, (len(x), *groups, columns), "[B, K] or [B, G, K]")


def _runs_reference(device: str) -> bool:
    return (
        device not in ("cpu", "cuda")
        or dispatch.all_off()
        or dispatch.has_transform(TransformType.Vmap, TransformType.Grad)
    )


def gathers(device: torch.device) -> bool:
    """Whether the products of all groups are one, of gathered weights."""
    return device.type != "cpu"


def _forward(x: Tensor, weights: list[Tensor], biases: list[Tensor], dtype: torch.dtype) -> Tensor:
    out = _products(x, weights, dtype)
    return out.add_(_gathered(biases, dtype)) if biases else out


def _tangent(
    x: Tensor, t_x: Tensor, weights: list[Tensor], biases: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    both = _products(torch.cat((x, t_x.to(x.dtype))), weights, dtype)
    values, tangents = both[: len(x)], both[len(x) :]
    # Not in place: what is kept for the backward pass must not keep the tangents' memory.
    return values + _gathered(biases, dtype) if biases else values.clone(), tangents


def _products(x: Tensor, weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    groups, (rows, _) = len(weights), weights[0].shape
    out = x.new_empty(len(x), groups, rows)
    # Autocast reaches into opaque operations.
    with torch.autocast(x.device.type, enabled=False):
        if not gathers(x.device):
            for i, weight in enumerate(weights):
                torch.mm(_group(x, i), weight.to(dtype).t(), out=out[:, i])
        elif x.dim() == 2:
            torch.mm(x, _gathered(weights, dtype).flatten(0, 1).t(), out=out.flatten(1))
        else:
            torch.bmm(x.transpose(0, 1), _gathered(weights, dtype).mT, out=out.transpose(0, 1))
    return out


def _group(x: Tensor, i: int) -> Tensor:
    return x if x.dim() == 2 else x[:, i]


def _gathered(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensors side by side, converted on the way."""
    if tensors[0].dtype == dtype:
        return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]
    buffer = torch.empty(len(tensors), *tensors[0].shape, dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_(list(buffer.unbind()), tensors)
    return buffer


def _backward(
    grad: Tensor, x: Tensor, weights: list[Tensor], biased: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weights [G, M, K] and of the biases [G, M]."""
    grad, values = grad.to(dtype).contiguous(), x.to(dtype)
    d_x = torch.empty_like(values)
    d_weights = values.new_empty(len(weights), *weights[0].shape)
    with torch.autocast(x.device.type, enabled=False):
        if not gathers(x.device):
            for i, weight in enumerate(weights):
                group, weight = grad[:, i], weight.to(dtype)
                torch.mm(group.t(), _group(values, i), out=d_weights[i])
                if x.dim() == 2:
                    torch.addmm(d_x, group, weight, beta=min(i, 1), out=d_x)
                else:
                    torch.mm(group, weight, out=d_x[:, i])
        elif x.dim() == 2:
            flat = grad.flatten(1)
            torch.mm(flat.t(), values, out=d_weights.flatten(0, 1))
            torch.mm(flat, _gathered(weights, dtype).flatten(0, 1), out=d_x)
        else:
            group = grad.transpose(0, 1)
            torch.bmm(group.mT, values.transpose(0, 1), out=d_weights)
            torch.bmm(group, _gathered(weights, dtype), out=d_x.transpose(0, 1))
        d_biases = grad.sum(0) if biased else grad.new_empty(0)
    wide = weights[0].dtype
    return d_x.to(x.dtype), d_weights.to(wide), d_biases.to(wide)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    x, weights, biases, dtype = inputs
    ctx.save_for_backward(x, *weights)
    ctx.biased, ctx.dtype = bool(biases), dtype
    ctx.set_materialize_grads(False)


def _tangent_setup(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, _, weights, biases, dtype = inputs
    _setup(ctx, (x, weights, biases, dtype), output[0])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad: Tensor | None, *_: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 4
    x, *weights = ctx.saved_tensors
    dispatch.refuse_tangents("the backward of grouped_linear", grad, x)
    d_x, d_weights, d_biases = _grouped_linear_backward(grad, x, weights, ctx.biased, ctx.dtype)
    return d_x, list(d_weights.unbind()), list(d_biases.unbind()), None


def _tangent_gradient(ctx, *gradients: Tensor | None) -> tuple:
    d_x, *rest = _gradient(ctx, *gradients)
    return d_x, None, *rest


def _fake(x: Tensor, weights: list[Tensor], biases: list[Tensor], dtype: torch.dtype) -> Tensor:
    return x.new_empty(len(x), len(weights), len(weights[0]), dtype=dtype)


def _tangent_fake(x: Tensor, t_x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return _fake(x, *others), _fake(t_x, *others)


def _backward_fake(
    grad: Tensor, x: Tensor, weights: list[Tensor], biased: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shape, first = weights[0].shape, weights[0]
    d_biases = first.new_empty(len(weights), shape[0]) if biased else first.new_empty(0)
    return dispatch.empty_like(x), first.new_empty(len(weights), *shape), d_biases


_grouped_linear = dispatch.register(
    "grouped_linear(Tensor x, Tensor[] weights, Tensor[] biases, ScalarType dtype) -> Tensor",
    _forward, _fake, backward=_gradient, setup_context=_setup,
)  # fmt: skip
_grouped_linear_tangent = dispatch.register(
    "grouped_linear_tangent(Tensor x, Tensor t_x, Tensor[] weights, Tensor[] biases, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    _tangent, _tangent_fake, backward=_tangent_gradient, setup_context=_tangent_setup,
)  # fmt: skip
_grouped_linear_backward = dispatch.register(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor[] weights, bool biased, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip
