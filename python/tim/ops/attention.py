"""Softmax attention with an exact forward-mode tangent in O(N) memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType

from tim.ops import _dispatch as dispatch
from tim.ops import pairs
from tim.ops.pairs import Operand, Pair

#: Elements of one tile of the score matrix, which bounds the memory of the tangent whatever the
#: sequence length: on a CPU what stays in a core's cache, on a GPU what keeps it busy.
TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}
BACKENDS = ("auto", "sdpa", "reference")


def attention(
    q: Operand,
    k: Operand,
    v: Operand,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Operand:
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
    if pairs.is_pair(q, k, v):
        return _of_pairs(q, k, v, scale, backend)
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
    transformed = dispatch.has_transform(TransformType.Vmap, TransformType.Grad)
    primals, tangents = dispatch.split_tangents(q, k, v)
    if backend == "reference" or (transformed and tangents is not None):
        return dispatch.drop_tangent_graph(attention_reference(q, k, v, scale))
    if backend == "auto" and _plain_is_faster(q, k):
        out = attention_reference(*primals, scale)
    else:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in primals), scale=scale)
        out = out.transpose(1, 2).contiguous()
    if tangents is None:
        return out
    t_out = _attention_tangent(*(x.detach() for x in primals), out.detach(), *tangents, scale)
    return dispatch.make_dual(dispatch.guard_backward("attention", out), t_out)


def _of_pairs(q: Operand, k: Operand, v: Operand, scale: float | None, backend: str) -> Pair:
    """The values of all samples and the tangents of some, of sequences of one length."""
    primals, tangents = pairs.split(*pairs.promote(q, k, v))
    _check(*primals, backend)
    scale = 1 / math.sqrt(primals[0].shape[-1]) if scale is None else float(scale)
    out = _dense(*primals, scale, backend)
    first = len(out) - pairs.count(tangents)
    inputs = (x[first:].detach() for x in (*primals, out))
    return Pair(out, _attention_tangent(*inputs, *tangents, scale))


def _plain_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether the plain formula beats scaled_dot_product_attention.

    On CPUs its backward in half precision takes 2 to 20 times as long up to 256 keys (PyTorch 2.13,
    benchmarks/bench_attention.py); a matrix of 256 columns is still linear in the queries.
    """
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.bfloat16, torch.float16)
        and (k.shape[1] <= 256)
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


_attention_tangent = dispatch.register(
    "attention_tangent(Tensor q, Tensor k, Tensor v, Tensor out, Tensor? t_q, Tensor? t_k, "
    "Tensor? t_v, float scale) -> Tensor",
    _tangent, _fake,
)  # fmt: skip
