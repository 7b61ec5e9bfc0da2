"""Linear layer whose tangent keeps no autograd graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from tim.ops import _dispatch as dispatch
from tim.ops import pairs
from tim.ops.pairs import Operand, Pair


def linear(x: Operand, weight: Tensor, bias: Operand | None = None) -> Operand:
    """x weight^T + bias; in forward mode its tangent t_x weight^T has no graph to the weights.

    PyTorch's own linear records the tangent's product for a later backward. The objective never
    differentiates a tangent, so recording it would only keep every tangent activation alive.

    Args:
        x: [..., K], or a Pair of that; weight: [M, K]. Dual numbers of weight or bias are exact
            too, through PyTorch's rule, but not beside a Pair.
        bias: [M], or None; or with x [B, N, K] one for each sample, [B, 1, M] or a Pair of that.

    Returns:
        [..., M]. Its forward-mode tangent is not differentiable.

    Raises:
        RuntimeError: shapes or dtypes do not match (raised by PyTorch).
        NotImplementedError: weights carry a tangent beside a Pair.
    """
    if pairs.is_pair(x, bias):
        return _linear_of_pairs(x, weight, bias)
    if bias is not None and bias.dim() > 1:
        return _add_rows(linear(x, weight), bias)
    if forward_ad._current_level < 0:
        return F.linear(x, weight, bias)
    parameters = (weight,) if bias is None else (weight, bias)
    if dispatch.split_tangents(*parameters)[1] is not None:
        return dispatch.drop_tangent_graph(F.linear(x, weight, bias))
    (primal,), tangents = dispatch.split_tangents(x)
    if tangents is None:
        return F.linear(x, weight, bias)
    out = dispatch.guard_backward("linear", F.linear(primal, weight, bias))
    with torch.no_grad():
        t_out = F.linear(tangents[0], weight)
    return forward_ad.make_dual(out, t_out)


def _linear_of_pairs(x: Operand, weight: Tensor, bias: Operand | None) -> Pair:
    """Two products, of values and of tangents, which are not in one place in memory.

    They could be: one buffer for both would make it one product. But values are kept for the
    backward pass, and would then keep the tangents' memory through all of it.
    """
    (primal, p_bias), (tangent, t_bias) = pairs.split(x, bias)
    dispatch.refuse_tangents("linear of a Pair", weight, p_bias)
    per_sample = p_bias is not None and p_bias.dim() > 1
    out = F.linear(primal, weight, None if per_sample else p_bias)
    if per_sample:
        out = _add_rows(out, p_bias)
    with torch.no_grad():
        if tangent is None:
            return Pair(out, t_bias.to(out.dtype).expand(len(t_bias), *out.shape[1:]))
        t_out = F.linear(tangent, weight)
        return Pair(out, t_out if t_bias is None else t_out.add_(t_bias))


def _add_rows(out: Tensor, rows: Tensor) -> Tensor:
    """out + rows, in place where autograd and transforms allow it: nobody else has `out` yet."""
    if forward_ad._current_level >= 0 or dispatch.has_transform(TransformType.Vmap):
        return out + rows
    return out.add_(rows)
