"""Split of the packed qkv, layer norm of q and k over the head, rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from tim.ops import _dispatch as dispatch
from tim.ops import pairs
from tim.ops._seen import Seen
from tim.ops.pairs import Operand, Pair

_SEEN = Seen()
_TABLES = ("q_weight", "q_bias", "k_weight", "k_bias", "cos", "sin")


def qk_norm_rope(
    qkv: Operand,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-5,
) -> tuple[Operand, Operand, Operand]:
    """q = rope(norm(q)), k = rope(norm(k)), v unchanged, out of one packed tensor.

    norm is the affine layer norm over the head dimension; rope turns each pair (a, b) of adjacent
    channels into (a cos - b sin, b cos + a sin) with the angles of its token.

    Args:
        qkv: [B, N, 3, H, D]; [3, H, D] contiguous, batch and token strides free.
        q_weight, q_bias, k_weight, k_bias: [D].
        cos, sin: [N, D], the two channels of a pair holding the same value.
        eps: added to the variance.

    Returns:
        q, k, v: [B, N, H, D], contiguous, in the dtype of qkv. Their forward-mode tangents are not
        differentiable.

    Raises:
        TypeError: an input is no dense floating-point tensor, or eps no number.
        ValueError: shapes or devices differ from the above, D is odd, or eps is negative.

    Source: Su et al., "RoFormer" (arXiv 2104.09864), eq. 34; q/k norm as in the released network.
    """
    dispatch.check_eps(eps)
    others = (q_weight, q_bias, k_weight, k_bias, cos, sin)
    if isinstance(qkv, Pair):
        _check(qkv.primal, *others)
        return _of_pair(qkv, others, eps)
    device = _check(qkv, *others)
    return _QK_NORM_ROPE(device, qkv, *others, eps)


def _of_pair(qkv: Pair, others: tuple[Tensor, ...], eps: float) -> tuple[Pair, Pair, Pair]:
    dispatch.refuse_tangents("qk_norm_rope of a Pair", *others)
    results = _QK_NORM_ROPE.beside((qkv.primal,), (qkv.tangent,), *others, eps)
    if results is None:
        return pairs.lift(lambda qkv: qk_norm_rope_reference(qkv, *others, eps), qkv)
    q, k, v, t_q, t_k, t_v = results
    return Pair(q, t_q), Pair(k, t_k), Pair(v, t_v)


def qk_norm_rope_reference(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, in PyTorch operations."""
    q, k, v = qkv.unbind(2)
    q = rotate_reference(_norm(q, q_weight, q_bias, eps), cos, sin).to(qkv.dtype)
    k = rotate_reference(_norm(k, k_weight, k_bias, eps), cos, sin).to(qkv.dtype)
    return q.contiguous(), k.contiguous(), v.contiguous()


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, N, H, D] with cos, sin [N, D], in the wider of the dtypes."""
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return x * cos[:, None] + turned * sin[:, None]


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # Not layer_norm's own affine form: its forward-mode rule breaks under torch.compile (2.13).
    return dispatch.layer_norm(x, eps) * weight + bias


def _check(qkv: Tensor, *tables: Tensor) -> str | None:
    """Raises what the docstring promises; returns `plain_device` of the tensors."""
    device = _SEEN.recall(qkv, *tables)
    if device is not None:
        return device
    device = dispatch.plain_device(qkv, *tables)
    if device is None:
        dispatch.check_tensors(qkv=qkv, **dict(zip(_TABLES, tables, strict=True)))
    shape = qkv.shape
    if len(shape) != 5 or shape[2] != 3 or shape[4] % 2:
        raise ValueError(f"qkv must have shape [B, N, 3, H, D] with even D, got {list(shape)}")
    row, angles = shape[4:], (shape[1], shape[4])
    if [table.shape for table in tables] != [row, row, row, row, angles, angles]:
        for name, table in zip(_TABLES[:4], tables, strict=False):
            dispatch.check_shape(name, table, row, "[D]")
        for name, table in zip(_TABLES[4:], tables[4:], strict=True):
            dispatch.check_shape(name, table, angles, "[N, D]")
    _SEEN.note(device, qkv, *tables)
    return device


def _packed(qkv: Tensor) -> Tensor:
    """qkv with [3, H, D] contiguous inside a token, copied only where it is not."""
    _, _, _, heads, head_dim = qkv.shape
    inner = (heads * head_dim, head_dim, 1)
    return qkv if qkv.stride()[2:] == inner else qkv.contiguous()


def _sizes(qkv: Tensor) -> tuple[int, int, int, int]:
    batch, tokens, _, heads, head_dim = qkv.shape
    return batch, tokens, heads, head_dim


def _outputs(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.empty(*_sizes(qkv), dtype=qkv.dtype, device=qkv.device)
    return q, torch.empty_like(q), torch.empty_like(q)


def _forward(qkv: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    *tables, eps = others
    outputs = _outputs(qkv)
    _run_forward(_packed(qkv), [*map(dispatch.float32, tables)], outputs, eps)
    return outputs


def _run_forward(qkv: Tensor, tables: list, outputs: tuple, eps: float) -> None:
    if qkv.numel():
        dispatch.launch(
            "qk_norm_rope", qkv, qkv, *tables, *outputs, *_sizes(qkv),
            *qkv.stride()[:2], eps, dispatch.DTYPE_CODES[qkv.dtype],
        )  # fmt: skip


def _tangent(qkv: Tensor, t_qkv: Tensor, *others: object) -> tuple[Tensor, ...]:
    """The tangent may be of the last samples alone."""
    *tables, eps = others
    outputs, t_outputs = _outputs(qkv), _outputs(t_qkv)
    qkv, t_qkv, tables = _packed(qkv), _packed(t_qkv), [*map(dispatch.float32, tables)]
    first, last = qkv.shape[0] - t_qkv.shape[0], outputs
    if first:
        _run_forward(qkv[:first], tables, tuple(out[:first] for out in outputs), eps)
        qkv, last = qkv[first:], tuple(out[first:] for out in outputs)
    if qkv.numel():
        dispatch.launch(
            "qk_norm_rope_tangent", qkv, qkv, t_qkv, *tables, *last, *t_outputs, *_sizes(qkv),
            *qkv.stride()[:2], *t_qkv.stride()[:2], eps, dispatch.DTYPE_CODES[qkv.dtype],
        )  # fmt: skip
    return (*outputs, *t_outputs)


def _backward(
    g_q: Tensor,
    g_k: Tensor,
    g_v: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = [gradient.contiguous() for gradient in (g_q, g_k, g_v)]
    qkv, tables = _packed(qkv), [*map(dispatch.float32, (q_weight, k_weight, cos, sin))]
    d_qkv = dispatch.empty_like(qkv)
    make = torch.empty if qkv.numel() else torch.zeros
    d_parameters = [make(qkv.shape[-1], dtype=torch.float32, device=qkv.device) for _ in range(4)]
    if qkv.numel():
        tensors = (*gradients, qkv, *tables, d_qkv, *d_parameters)
        dispatch.launch(
            "qk_norm_rope_backward", qkv, *tensors, *_sizes(qkv),
            *qkv.stride()[:2], eps, dispatch.DTYPE_CODES[qkv.dtype],
        )  # fmt: skip
    return (d_qkv, *d_parameters)


def _save(ctx, qkv: Tensor, others: tuple, output: tuple[Tensor, ...]) -> None:
    q_weight, q_bias, k_weight, k_bias, cos, sin, eps = others
    ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
    ctx.eps = eps
    ctx.parameter_dtypes = [p.dtype for p in (q_weight, q_bias, k_weight, k_bias)]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])


def _setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs[0], inputs[1:], output)


def _tangent_setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs[0], inputs[2:], output)


def _gradient(ctx, *gradients: Tensor | None) -> tuple:
    qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
    if all(gradient is None for gradient in gradients[:3]):
        return (None,) * 8
    g_q, g_k, g_v = (
        qkv.new_zeros(_sizes(qkv)) if gradient is None else gradient for gradient in gradients[:3]
    )
    dispatch.refuse_tangents("the backward of qk_norm_rope", g_q, g_k, g_v, qkv)
    d_qkv, *d_parameters = _qk_norm_rope_backward(
        g_q, g_k, g_v, qkv, q_weight, k_weight, cos, sin, ctx.eps
    )
    d_parameters = [d.to(t) for d, t in zip(d_parameters, ctx.parameter_dtypes, strict=True)]
    return d_qkv, *d_parameters, None, None, None


def _tangent_gradient(ctx, *gradients: Tensor | None) -> tuple:
    d_qkv, *rest = _gradient(ctx, *gradients)
    return d_qkv, None, *rest


def _fake(qkv: Tensor, *_: object) -> tuple[Tensor, ...]:
    return _outputs(qkv)


def _tangent_fake(qkv: Tensor, t_qkv: Tensor, *_: object) -> tuple[Tensor, ...]:
    return (*_outputs(qkv), *_outputs(t_qkv))


def _backward_fake(
    g_q: Tensor, g_k: Tensor, g_v: Tensor, qkv: Tensor, *_: object
) -> tuple[Tensor, ...]:
    d_qkv = dispatch.empty_like(qkv)
    return (d_qkv, *(qkv.new_empty(qkv.shape[-1], dtype=torch.float32) for _ in range(4)))


_SCHEMA = ", ".join(f"Tensor {name}" for name in _TABLES) + ", float eps"
_qk_norm_rope_backward = dispatch.register(
    "qk_norm_rope_backward(Tensor g_q, Tensor g_k, Tensor g_v, Tensor qkv, Tensor q_weight, "
    "Tensor k_weight, Tensor cos, Tensor sin, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip
_QK_NORM_ROPE = dispatch.Operator(
    "qk_norm_rope",
    qk_norm_rope_reference,
    plain=dispatch.register(
        f"qk_norm_rope(Tensor qkv, {_SCHEMA}) -> (Tensor, Tensor, Tensor)",
        _forward, _fake, backward=_gradient, setup_context=_setup,
    ),
    pair=dispatch.register(
        f"qk_norm_rope_tangent(Tensor qkv, Tensor t_qkv, {_SCHEMA}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _tangent, _tangent_fake, backward=_tangent_gradient, setup_context=_tangent_setup,
    ),
    outputs=3,
    moving=1,  # tangents of weights or angles are no part of training
    constant=(5, 6),
)  # fmt: skip
