"""The tangent of attention in tiles of PyTorch operations, for what no kernel covers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tim.ops import _dispatch as dispatch

#: Elements of one tile of the score matrix, which bounds the memory of the tangent whatever the
#: sequence length: on a CPU what stays in a core's cache, on a GPU what keeps it busy.
TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}


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
    operands = tuple(map(_heads_first, (q, k, v, out, t_q, t_k, t_v)))
    result = dispatch.empty_like(q)
    if not result.numel():
        return result
    batch, tokens, heads, _ = q.shape
    keys, tile = k.shape[1], TILE_ELEMENTS[q.device.type]
    target = result.transpose(1, 2)
    # Autocast reaches into opaque operations and would round the float32 scores.
    with torch.autocast(q.device.type, enabled=False):
        if heads * tokens * keys <= tile // 4:
            # Short sequences: one copy makes a batch of many samples out of many small products.
            group = max(1, tile // (heads * tokens * keys))
            for start in range(0, batch, group):
                chosen = slice(start, start + group)
                parts = _each(operands, lambda x, chosen=chosen: x[chosen].flatten(0, 1))
                target[chosen] = _rows(*parts, scale).unflatten(0, (-1, heads))
            return result
        rows = max(1, min(tokens, tile // keys))
        group = max(1, tile // (rows * keys))
        for sample in range(batch):
            for head in range(0, heads, group):
                some = slice(head, head + group)
                q_, k_, v_, o_, tq, tk, tv = _each(operands, lambda x, s=sample, h=some: x[s, h])
                for row in range(0, tokens, rows):
                    few = slice(row, row + rows)
                    query = _each((q_, o_, tq), lambda x, few=few: x[:, few])
                    part = _rows(query[0], k_, v_, query[1], query[2], tk, tv, scale)
                    target[sample, some, few] = part
    return result


def log_sum_exp(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """L [B, H, N], of the scores scale q k^T over the keys, in tiles."""
    query, key = _heads_first(q), _heads_first(k)
    result = query.new_empty(query.shape[:3])
    if not result.numel():
        return result
    batch, heads, tokens, _ = query.shape
    rows = max(1, min(tokens, TILE_ELEMENTS[q.device.type] // (heads * k.shape[1])))
    with torch.autocast(q.device.type, enabled=False):
        for sample in range(batch):
            for row in range(0, tokens, rows):
                few = slice(row, row + rows)
                scores = _scores(query[sample, :, few], key[sample], scale)
                result[sample, :, few] = scores.logsumexp(-1)
    return result


def _heads_first(x: Tensor | None) -> Tensor | None:
    """[B, N, H, D] as [B, H, N, D], at least float32: scores of half precision would cost the
    tangent more accuracy than everything else together."""
    if x is None:
        return None
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)


def _each(operands: tuple, function: Callable[[Tensor], Tensor]) -> tuple:
    return tuple(None if x is None else function(x) for x in operands)


def _rows(q, k, v, out, t_q, t_k, t_v, scale: float) -> Tensor:
    """The tangent of some query rows against all keys; every operand [heads, rows, D]."""
    p = _scores(q, k, scale).softmax(-1)
    t_out = torch.zeros_like(out) if t_v is None else torch.bmm(p, t_v)
    if t_q is None and t_k is None:
        return t_out
    if t_q is None:
        g = _scores(q, t_k, scale)
    else:
        g = _scores(t_q, k, scale)
        if t_k is not None:
            g.baddbmm_(q, t_k.mT, alpha=scale)
    g.mul_(p)
    t_out.baddbmm_(g, v)
    return t_out.addcmul_(g.sum(-1, keepdim=True), out, value=-1)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    return scores.baddbmm_(q, k.mT, beta=0, alpha=scale)


def _fake(q: Tensor, *_: object) -> Tensor:
    return dispatch.empty_like(q)


tiled_tangent = dispatch.register(
    "attention_tiled_tangent(Tensor q, Tensor k, Tensor v, Tensor out, Tensor? t_q, Tensor? t_k, "
    "Tensor? t_v, float scale) -> Tensor",
    _tangent, _fake,
)  # fmt: skip
