"""Softmax attention with an exact forward-mode tangent in O(N) memory."""

from __future__ import annotations

import itertools
import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from tim._checks import check_number, check_tensor
from tim.ops import _attention_forward as forward
from tim.ops import _attention_kernels as kernels
from tim.ops import _dispatch as dispatch
from tim.ops import pairs
from tim.ops._attention_tiled import tiled_tangent
from tim.ops._seen import Seen
from tim.ops._table import recall
from tim.ops.pairs import Operand, Pair

BACKENDS = ("auto", "kernel", "sdpa", "flash_attn", "reference")
#: Who computes the forward pass where our kernels run: the fastest that was measured on a CPU
#: (docs/attention.md). On a GPU nothing was measured yet, and PyTorch's is taken.
FASTEST_FORWARD = {"cpu": "kernel", "cuda": "sdpa"}
#: cu_seqlens of queries and keys, and upper bounds of the lengths; None where nothing is packed.
Packing = tuple[Tensor, Tensor, int, int] | None
_SEEN = Seen()


def attention(
    q: Operand,
    k: Operand,
    v: Operand,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Operand:
    """softmax(q k^T scale) v, with forward, backward and forward-mode tangent.

    With P the softmax and O the output, the tangent is

        G = P * (t_q k^T + q t_k^T) scale        t_O = G v - rowsum(G) * O + P t_v

    where absent tangents cost nothing. It needs O and the log-sum-exp of the scores, whoever
    computed them, and nothing of size N x M is stored, here or for the backward pass, except by
    the reference, which torch.func.vmap and torch.func.grad run.

    Args:
        q: [B, N, H, D]; k, v: [B, M, H, D]; any strides.
        cu_seqlens_q, cu_seqlens_k: int [S + 1] on the device of q, row offsets of S packed
            sequences; B must then be 1. Sequence i of q attends to sequence i of k and v only; a
            query without keys gets zero. On a GPU, and inside torch.compile, their values are not
            checked, as reading them would wait for it: there, rows behind the last one are not
            written.
        max_seqlen_q, max_seqlen_k: upper bounds of the sequences' lengths, which may spare a GPU
            some work.
        scale: 1 / sqrt(D) when None.
        backend: who computes the forward pass: "kernel" (ours), "sdpa" (PyTorch), "flash_attn"
            (if installed), "reference" (the plain formula, stores N x M), or "auto".

    Returns:
        [B, N, H, D], contiguous, in the common dtype, or that of autocast. Its forward-mode tangent
        is not differentiable.

    Raises:
        TypeError: an input is no floating-point tensor.
        ValueError: shapes, devices or cu_seqlens do not fit, or the backend is unknown or cannot
            take these inputs.

    Source: Vaswani et al. (arXiv 1706.03762), eq. 1; the tangent follows by differentiation. The
    forward and backward passes in tiles: Dao et al. (arXiv 2205.14135).
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    device = None
    if cu_seqlens_q is cu_seqlens_k is max_seqlen_q is max_seqlen_k is None:
        device = _SEEN.recall(q, k, v)
    if device is not None:
        operands = primals = (q, k, v)
        tangents = packing = None
    else:
        device, operands, primals, tangents = _operands(q, k, v)
        _check(*primals)
        packing = _packing(*primals[:2], *bounds)
        _note(device, (q, k, v), primals, packing)
    if scale is None:
        scale = 1 / math.sqrt(primals[0].shape[-1])
    elif type(scale) is not float or not math.isfinite(scale):
        check_number("scale", scale)
        scale = float(scale)
    source = _choose(device, primals, tangents, packing, backend)
    if source == "reference":
        offsets = () if packing is None else packing[:2]
        out = pairs.lift(lambda q, k, v: attention_reference(q, k, v, scale, *offsets), *operands)
        return out if isinstance(out, Pair) else dispatch.drop_tangent_graph(out)
    if source != "pytorch":
        out, t_out = _by_kernels(device, primals, tangents, packing, scale, source)
    elif packing is None:
        out, t_out = _by_pytorch(primals, tangents, scale, backend)
    else:
        out, t_out = _each_sequence(primals, tangents, packing, scale, backend)
    if t_out is None:
        return out
    return Pair(out, t_out) if pairs.is_pair(q, k, v) else dispatch.make_dual(out, t_out)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """The specification, in PyTorch operations. Stores the N x M matrix."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    if cu_seqlens_q is None or cu_seqlens_k is None:
        weights = scores.softmax(-1)
    else:
        others = _sequence(cu_seqlens_q, q)[:, None] != _sequence(cu_seqlens_k, k)
        # With finite numbers in their places, rows without keys have no NaN in their derivatives.
        weights = scores.masked_fill(others, torch.finfo(scores.dtype).min).softmax(-1)
        weights = weights.masked_fill(others, 0.0)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).contiguous()


def _operands(
    q: Operand, k: Operand, v: Operand
) -> tuple[str | None, tuple, tuple[Tensor, ...], tuple[Tensor | None, ...] | None]:
    """`plain_device`, the operands in the dtype of the result, their primals and tangents."""
    if pairs.is_pair(q, k, v):
        primals, tangents = pairs.split_promoted(q, k, v)
        operands = pairs.join(primals, tangents)
        if dispatch.product_dtype(primals[0]) != primals[0].dtype:
            operands = _for_products(*operands)
            primals, tangents = pairs.split(*operands)
        device = dispatch.plain_device(*primals, *[t for t in tangents if t is not None])
        return device, operands, primals, tangents
    device = dispatch.plain_device(q, k, v)
    if device is None:
        dispatch.check_tensors(q=q, k=k, v=v)
    operands = _for_products(*dispatch.promote(q, k, v))
    return device, operands, *dispatch.split_tangents(*operands)


def _note(device: str | None, given: tuple, taken: tuple[Tensor, ...], packing: Packing) -> None:
    """That tensors like those given pass every check and are taken as they are."""
    # Autocast's dtype is nothing that guards compare.
    if device is None or packing is not None or torch.is_autocast_enabled(device):
        return
    if all(map(operator.is_, given, taken)):
        _SEEN.note(device, *taken)


def _for_products(*operands: Operand) -> tuple[Operand, ...]:
    """Operands in the dtype that autocast gives to products."""
    first = operands[0].primal if isinstance(operands[0], Pair) else operands[0]
    dtype = dispatch.product_dtype(first)
    if dtype == first.dtype:
        return operands
    return tuple(pairs.each(lambda x: x.to(dtype), operand) for operand in operands)


def _sequence(cu_seqlens: Tensor, packed: Tensor) -> Tensor:
    """Number of the sequence that each row belongs to."""
    rows = torch.arange(packed.shape[1], device=packed.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(rows, cu_seqlens[1:], right=True)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, N, H, D], got {list(q.shape)}")
    batch, _, heads, head_dim = q.shape
    if head_dim == 0:
        raise ValueError(f"q must have at least one number per head, got {list(q.shape)}")
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, heads, head_dim):
        raise ValueError(
            f"k must have shape [B, M, H, D] = [{batch}, M, {heads}, {head_dim}], "
            f"got {list(k.shape)}"
        )
    dispatch.check_shape("v", v, k.shape, "that of k")


def _packing(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Packing:
    if cu_seqlens_q is None and cu_seqlens_k is None:
        for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if bound is not None:
                raise ValueError(f"{name} must come with cu_seqlens, got {bound} without")
        if k.shape[1] == 0:
            raise ValueError("k must hold at least one token, got M = 0")
        return None
    offsets, longest = [], []
    for name, cu_seqlens, x, bound in (
        ("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q),
        ("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k),
    ):
        if cu_seqlens is None:
            raise ValueError(f"{name} must be given together with the other cu_seqlens, got None")
        check_tensor(name, cu_seqlens)
        longest.append(_longest(name.replace("cu_seqlens", "max_seqlen"), x.shape[1], bound))
        _check_offsets(name, cu_seqlens, x, longest[-1])
        offsets.append(cu_seqlens.to(torch.int32).contiguous())
    if len(offsets[0]) != len(offsets[1]):
        raise ValueError(
            f"cu_seqlens_k must have as many entries as cu_seqlens_q, {len(offsets[0])}, "
            f"got {len(offsets[1])}"
        )
    return *offsets, *longest


def _check_offsets(name: str, cu_seqlens: Tensor, packed: Tensor, longest: int) -> None:
    batch, tokens = packed.shape[:2]
    if batch != 1:
        raise ValueError(f"{name} needs packed inputs with B = 1, got B = {batch}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be an integer vector [S + 1], got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != packed.device:
        raise ValueError(f"{name} must be on {packed.device} like q, got {cu_seqlens.device}")
    if len(cu_seqlens) < 2 and tokens:
        raise ValueError(
            f"{name} must have at least two entries for {tokens} tokens, got {len(cu_seqlens)}"
        )
    # The values are read where that makes nobody wait: not on a GPU, nor of a compiler's tensors.
    ordinary = type(cu_seqlens) is Tensor and cu_seqlens.device.type == "cpu"
    if ordinary and not torch.compiler.is_compiling():
        kernels.first_rows(name, cu_seqlens, tokens, longest)


def _longest(name: str, tokens: int, given: int | None) -> int:
    """The upper bound of the sequences' lengths."""
    if given is None:
        return tokens
    if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {given!r}")
    if given < min(tokens, 1):
        raise ValueError(f"{name} must be at least {min(tokens, 1)}, got {given}")
    return given


def _choose(
    device: str | None,
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor | None, ...] | None,
    packing: Packing,
    backend: str,
) -> str:
    """Who computes: "reference"; "pytorch", with a tangent in tiles; or the source of the output
    and its log-sum-exp from which our kernels go on. `device` is what `plain_device` says."""
    moving = tangents is not None
    if forward_ad._current_level >= 0 and dispatch.has_transform(
        TransformType.Vmap, TransformType.Grad
    ):
        return "reference"  # its operations have rules for torch.func, ours have none
    if backend == "reference":
        return backend
    direction = "tangent" if moving else dispatch.direction_of(primals)
    if device is None:
        reason = dispatch.why_not("attention", *primals, direction=direction)
    else:
        reason = recall("attention", direction, device, primals[0].dtype).why_not(primals[0])
    source = backend
    if backend == "auto" and reason is not None:
        source = "sdpa"
    elif backend == "auto":
        place = device or primals[0].device.type
        source = FASTEST_FORWARD[place] if packing is None else "kernel"
        if packing is None and not moving and forward.sdpa_is_faster(*primals[:2]):
            source = "sdpa"
    if source == "flash_attn" and reason is None:
        reason = forward.why_no_flash_attn(primals[0])
    if source != "sdpa":
        if reason is not None:
            raise ValueError(f"backend {source!r} cannot take these inputs: {reason}")
        return source
    if packing is not None:
        # One sequence after the other needs their lengths, which a compiler does not know.
        return "reference" if torch.compiler.is_compiling() else "pytorch"
    # With our own backward pass wherever the kernels can run, tangents or not: activation
    # checkpointing leaves tangents out when it recomputes, and then has to find the same saved.
    return source if reason is None else "pytorch"


def _by_kernels(
    device: str | None,
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor | None, ...] | None,
    packing: Packing,
    scale: float,
    source: str,
) -> tuple[Tensor, Tensor | None]:
    plain, dual = kernels.plain, kernels.dual
    if packing is None:
        offsets = (None, None, primals[0].shape[1], primals[1].shape[1])
        if device is not None:  # the offsets of packed sequences were not looked at
            plain, dual = plain.direct, dual.direct
    else:
        offsets = packing
    if tangents is None:
        return plain(*primals, *offsets, scale, source)[0], None
    out, _, t_out = dual(*primals, *tangents, *offsets, scale, source)
    return out, t_out


def _each_sequence(
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor | None, ...] | None,
    packing: tuple[Tensor, Tensor, int, int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Packed sequences one after the other, by what takes only whole batches."""
    q, k, v = primals
    rows_q = kernels.first_rows("cu_seqlens_q", packing[0], q.shape[1], packing[2])
    rows_k = kernels.first_rows("cu_seqlens_k", packing[1], k.shape[1], packing[3])
    parts = []
    spans = zip(itertools.pairwise(rows_q), itertools.pairwise(rows_k), strict=True)
    for (a, b), (c, d) in spans:
        operands = (q[:, a:b], k[:, c:d], v[:, c:d])
        if c == d:
            zero = attention_reference(*operands, scale)
            parts.append((zero, torch.zeros_like(zero)))
            continue
        moving = tangents and tuple(
            None if t is None else t[:, first:last]
            for t, first, last in zip(tangents, (a, c, c), (b, d, d), strict=True)
        )
        parts.append(_by_pytorch(operands, moving, scale, backend))
    if not parts:
        zero = attention_reference(q, k, v, scale)
        parts.append((zero, torch.zeros_like(zero)))
    out = torch.cat([out for out, _ in parts], dim=1)
    return out, None if tangents is None else torch.cat([t_out for _, t_out in parts], dim=1)


def _by_pytorch(
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor | None, ...] | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    q, k, _ = primals
    if backend == "auto" and _plain_is_faster(q, k):
        out = attention_reference(*primals, scale)
    else:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in primals), scale=scale)
        out = out.transpose(1, 2).contiguous()
    if tangents is None:
        return out, None
    first = len(out) - pairs.count(tangents)
    last = (x[first:].detach() for x in (*primals, out))
    return dispatch.guard_backward("attention", out), tiled_tangent(*last, *tangents, scale)


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
