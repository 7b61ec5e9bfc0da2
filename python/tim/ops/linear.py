"""Linear layer whose tangent keeps no autograd graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tim.ops import _dispatch as dispatch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias; in forward mode its tangent t_x weight^T has no graph to the weights.

    PyTorch's own linear records the tangent's product for a later backward. The objective never
    differentiates a tangent, so recording it would only keep every tangent activation alive.

    Args:
        x: [..., K]; weight: [M, K]; bias: [M] or None. Tangents of weight or bias are exact too,
            through PyTorch's rule.

    Returns:
        [..., M]. Its forward-mode tangent is not differentiable.

    Raises:
        RuntimeError: shapes or dtypes do not match (raised by PyTorch).
    """
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
