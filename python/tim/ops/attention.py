"""Softmax attention with an exact forward-mode tangent in O(N) memory."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tim.ops import _dispatch as dispatch

#: Elements of one tile of the score matrix. Tiles of this size stay in a core's cache and bound the
#: memory of the tangent whatever the sequence length.
TILE_ELEMENTS = 1 << 18
BACKENDS = ("auto", "sdpa", "reference")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T scale) v, with forward, backward and forward-mode tangent.

    Forward and backward are PyTorch's scaled_dot_product_attention. With P the softmax and O the
    output, the tangent is

        G = P * (t_q k^T + q t_k^T) scale        t_O = G v - rowsum(G) * O + P t_v

    computed tile by tile: nothing of size N x M is stored.

    Args:
        q: [B, N, H, D]; k, v: [B, M, H, D]; any strides.
        cu_seqlens_q, cu_seqlens_k: int [S + 1], row offsets of S packed sequences; B must then be
            1. Sequence i of q attends to sequence i of k and v only. Reading them synchronises.
        scale: 1 / sqrt(D) when None.
        backend: "auto", "sdpa", or "reference" (the plain formula, stores N x M).

    Returns:
        [B, N, H, D], contiguous, in the common dtype. Its forward-mode tangent is not
        differentiable.

    Raises:
        TypeError: an input is no floating-point tensor.
        ValueError: shapes, devices or cu_seqlens do not fit, or the backend is unknown.

    Source: Vaswani et al. (arXiv 1706.03762), eq. 1; the tangent follows by differentiation.
    """
    dispatch.check_tensors(q=q, k=k, v=v)
    _check(q, k, v, backend)
    q, k, v = dispatch.promote(q, k, v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return _dense(q, k, v, scale, backend)
    rows_q = _offsets("cu_seqlens_q", cu_seqlens_q, q)
    rows_k = _offsets("cu_seqlens_k", cu_seqlens_k, k)
    if len(rows_q) != len(rows_k):
        raise ValueError(
            f"cu_seqlens_k must have as many entries as cu_seqlens_q, {len(rows_q)}, "
            f"got {len(rows_k)}"
        )
    spans = zip(itertools.pairwise(rows_q), itertools.pairwise(rows_k), strict=True)
    parts = [_dense(q[:, a:b], k[:, c:d], v[:, c:d], scale, backend) for (a, b), (c, d) in spans]
    return torch.cat(parts, dim=1) if parts else torch.zeros_like(q)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The specification, in PyTorch operations. Stores the N x M matrix."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, N, H, D], got {list(q.shape)}")
    batch, _, heads, head_dim = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, heads, head_dim):
        raise ValueError(
            f"k must have shape [B, M, H, D] = [{batch}, M, {heads}, {head_dim}], "
            f"got {list(k.shape)}"
        )
    dispatch.check_shape("v", v, k.shape, "that of k")
    if k.shape[1] == 0:
        raise ValueError("k must hold at least one token, got M = 0")


def _offsets(name: str, cu_seqlens: Tensor | None, packed: Tensor) -> list[int]:
    if cu_seqlens is None:
        raise ValueError(f"{name} must be given together with the other cu_seqlens, got None")
    if packed.shape[0] != 1:
        raise ValueError(f"{name} needs packed inputs with B = 1, got B = {packed.shape[0]}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be an integer vector [S + 1], got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)}"
        )
    rows = cu_seqlens.tolist()
    ascending = all(a <= b for a, b in itertools.pairwise(rows))
    if not rows or rows[0] != 0 or rows[-1] != packed.shape[1] or not ascending:
        raise ValueError(f"{name} must ascend from 0 to {packed.shape[1]}, got {rows}")
    return rows


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    batched = any(torch._C._functorch.is_batchedtensor(tensor) for tensor in (q, k, v))
    primals, tangents = dispatch.split_tangents(q, k, v)
    if backend == "reference" or (batched and tangents is not None):
        return dispatch.drop_tangent_graph(attention_reference(q, k, v, scale))
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in primals), scale=scale)
    out = out.transpose(1, 2).contiguous()
    if tangents is None:
        return out
    t_out = _attention_tangent(*(x.detach() for x in primals), out.detach(), *tangents, scale)
    return dispatch.make_dual(out, t_out)


def _heads_first(x: Tensor | None) -> Tensor | None:
    """[B, N, H, D] to contiguous [B H, N, D], at least float32: scores of half precision would cost
    the tangent more accuracy than everything else together."""
    if x is None:
        return None
    return (
        x.transpose(1, 2).flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    )


def _tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    scale: float,
) -> Tensor:
    batch, tokens, heads, _ = q.shape
    operands = [_heads_first(x) for x in (q, k, v, out, t_q, t_k, t_v)]
    result = torch.empty_like(operands[0])
    keys = k.shape[1]
    rows = max(1, min(tokens, TILE_ELEMENTS // keys))
    group = max(1, TILE_ELEMENTS // (max(tokens, 1) * keys))
    for head in range(0, batch * heads, group):
        these = slice(head, head + group)
        _, key, value, _, _, t_key, t_value = (None if x is None else x[these] for x in operands)
        for row in range(0, tokens, rows):
            tile = (these, slice(row, row + rows))
            query, output, t_query = (
                None if x is None else x[tile] for x in (operands[0], operands[3], operands[4])
            )
            # Autocast reaches into opaque operations and would round the float32 scores.
            with torch.autocast(q.device.type, enabled=False):
                result[tile] = _tile(query, key, value, output, t_query, t_key, t_value, scale)
    return result.unflatten(0, (batch, heads)).transpose(1, 2).to(q.dtype).contiguous()


def _tile(q, k, v, out, t_q, t_k, t_v, scale: float) -> Tensor:
    """The tangent of some query rows against all keys; every operand [heads, rows, D]."""
    p = torch.bmm(q, k.mT).mul_(scale).softmax(-1)
    t_out = torch.zeros_like(out) if t_v is None else torch.bmm(p, t_v)
    if t_q is None and t_k is None:
        return t_out
    if t_q is None:
        g = torch.bmm(q, t_k.mT)
    else:
        g = torch.bmm(t_q, k.mT)
        if t_k is not None:
            g.baddbmm_(q, t_k.mT)
    g.mul_(p).mul_(scale)
    t_out.baddbmm_(g, v)
    return t_out.addcmul_(g.sum(-1, keepdim=True), out, value=-1)


def _fake(q: Tensor, *_: object) -> Tensor:
    return dispatch.empty_like(q)


_attention_tangent = dispatch.register(
    "attention_tangent(Tensor q, Tensor k, Tensor v, Tensor out, Tensor? t_q, Tensor? t_k, "
    "Tensor? t_v, float scale) -> Tensor",
    _tangent, _fake,
)  # fmt: skip
