"""The opaque operations behind attention: plain, with tangent, and the backward pass of both."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tim.ops import _attention_forward as forward
from tim.ops import _dispatch as dispatch
from tim.ops import pairs
from tim.ops._attention_hopper import DUAL_WIDTHS, VERSIONS, version_of


def first_rows(name: str, cu_seqlens: Tensor, rows: int, longest: int) -> list[int]:
    """The first rows of the sequences, checked."""
    offsets = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(offsets)]
    if not offsets or offsets[0] != 0 or offsets[-1] != rows or min(lengths, default=0) < 0:
        raise ValueError(f"{name} must ascend from 0 to {rows}, got {offsets}")
    if max(lengths, default=0) > longest:
        bound = name.replace("cu_seqlens", "max_seqlen")
        raise ValueError(f"{bound} must be at least {max(lengths)}, the longest, got {longest}")
    return offsets


def _operand(x: Tensor | None) -> Tensor | None:
    """With the numbers of a head side by side."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _launch(
    name: str,
    inputs: tuple[Tensor | None, ...],
    strided: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    packing: tuple[Tensor | None, Tensor | None, int, int],
    scale: float,
) -> None:
    """Call a kernel: pointers of `inputs`, offsets and outputs, strides of `strided`, sizes."""
    q, k = strided[:2]
    batch, tokens, heads, head_dim = q.shape
    first_q, first_k, *longest = packing
    sequences = 0 if first_q is None else first_q.shape[0] - 1
    name = version_of(name, q.device.type)
    dispatch.launch(
        name, q, *inputs, first_q, first_k, *outputs, *map(_strides, strided),
        batch, tokens, k.shape[1], heads, head_dim, sequences, *longest, scale,
        dispatch.DTYPE_CODES[q.dtype],
    )  # fmt: skip


def _check_values(q: Tensor, k: Tensor, packing: tuple) -> None:
    if packing[0] is not None and q.device.type == "cpu":
        first_rows("cu_seqlens_q", packing[0], q.shape[1], packing[2])
        first_rows("cu_seqlens_k", packing[1], k.shape[1], packing[3])


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    source: str,
) -> tuple[Tensor, Tensor]:
    packing = (cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    _check_values(q, k, packing)
    if q.numel() and source == "sdpa":
        return forward.by_sdpa(q, k, v, scale)
    if q.numel() and source == "flash_attn":
        return forward.by_flash_attn(q, k, v, scale, *packing)
    out, lse = _fake(q)
    if q.numel():
        operands = (_operand(q), _operand(k), _operand(v))
        _launch("attention", operands, operands, (out, lse), packing, scale)
    return out, lse


def _tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    source: str,
) -> tuple[Tensor, Tensor, Tensor]:
    packing = (cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    tangents = tuple(map(_operand, (t_q, t_k, t_v)))
    first = q.shape[0] - pairs.count(tangents)
    fused = source == "kernel" and dispatch.has_kernel("attention_dual", q.device.type)
    # Hopper's fused pass takes narrow heads only. Its versions hand packed sequences on to the
    # kernels for all GPUs, which have one.
    hopper = [
        version_of(name, q.device.type) in VERSIONS.values()
        for name in ("attention_tangent", "attention_dual")
    ]
    if cu_seqlens_q is None and hopper[0] and not (hopper[1] and q.shape[-1] in DUAL_WIDTHS):
        fused = False
    if not fused:
        out, lse = _forward(q, k, v, *packing, scale, source)
    else:
        _check_values(q, k, packing)
        out, lse = _fake(q)
    q, k, v = map(_operand, (q, k, v))
    last, results = (q, k, v), (out, lse)
    if first:
        if fused and out.numel():
            head = (q[:first], k[:first], v[:first])
            _launch("attention", head, head, (out[:first], lse[:first]), packing, scale)
        last, results = (q[first:], k[first:], v[first:]), (out[first:], lse[first:])
    t_out = dispatch.empty_like(last[0])
    if t_out.numel():
        strided = (*last, *tangents)
        if fused:
            _launch("attention_dual", strided, strided, (*results, t_out, None), packing, scale)
        else:
            inputs = (*last, *results, *tangents)
            _launch("attention_tangent", inputs, strided, (t_out, None), packing, scale)
    return out, lse, t_out


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens_q is None and q.numel() and forward.sdpa_backward_is_faster(q, k):
        return forward.backward_by_sdpa(grad, q, k, v, out, lse, scale)
    gradients = _backward_fake(grad, q, k, v)
    if not q.numel():
        return gradients[0], gradients[1].zero_(), gradients[2].zero_()
    operands = (_operand(q), _operand(k), _operand(v))
    inputs = (grad.contiguous(), *operands, out, lse)
    packing = (cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    scratch = torch.empty_like(lse) if q.device.type in dispatch.WITH_SCRATCH else None
    _launch("attention_backward", inputs, operands, (scratch, *gradients), packing, scale)
    return gradients


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    # Not torch.empty, which takes half a microsecond longer.
    strides = (heads * tokens, tokens, 1)
    lse = q.new_empty_strided((batch, heads, tokens), strides, dtype=torch.float32)
    return dispatch.empty_like(q), lse


def _tangent_fake(
    q: Tensor, k: Tensor, v: Tensor, t_q: Tensor | None, t_k: Tensor | None, t_v: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    first = len(q) - pairs.count((t_q, t_k, t_v))
    return *_fake(q), dispatch.empty_like(q[first:])


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.empty_like(q), dispatch.empty_like(k), dispatch.empty_like(v)


def _setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *offsets, max_q, max_k, scale, _ = inputs[-6:]
    ctx.save_for_backward(*inputs[:3], *output[:2], *offsets)
    ctx.sizes = (max_q, max_k, scale)
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dispatch.refuse_tangents("the backward of attention", grad, *saved[:4])
    gradients = _attention_backward(grad, *saved, *ctx.sizes)
    return (*gradients, *[None] * (len(ctx.needs_input_grad) - 3))


plain = dispatch.register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_q, SymInt max_k, float scale, str source) -> (Tensor, Tensor)",
    _forward, _fake, backward=_gradient, setup_context=_setup,
)  # fmt: skip
dual = dispatch.register(
    "attention_tangent(Tensor q, Tensor k, Tensor v, Tensor? t_q, Tensor? t_k, Tensor? t_v, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_q, SymInt max_k, float scale, "
    "str source) -> (Tensor, Tensor, Tensor)",
    _tangent, _tangent_fake, backward=_gradient, setup_context=_setup,
)  # fmt: skip
_attention_backward = dispatch.register(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_q, SymInt max_k, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip
