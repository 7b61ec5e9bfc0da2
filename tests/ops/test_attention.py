import functools
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from contract import ForwardBackward, Tangent, assert_close
from modes import PairModes
from torch.nn.attention import SDPBackend, sdpa_kernel

from properties import given, settings, st
from tim import ops


class AttentionModes(PairModes):
    in_graph = ("attention",)

    def expected_in_graph(self, path: str, recorded: bool) -> set[str] | None:
        # Who computes on a GPU is a matter of dtype and size.
        return None if path == "cuda" else super().expected_in_graph(path, recorded)


class TestAttention(ForwardBackward, Tangent, AttentionModes):
    name = "attention"
    op = staticmethod(ops.attention)
    reference = staticmethod(ops.attention_reference)
    # (B, N, M, H, D)
    sizes = (
        (2, 5, 3, 2, 8),
        (1, 1, 1, 1, 4),
        (2, 16, 16, 6, 64),
        (1, 67, 130, 2, 72),
        (2, 33, 9, 1, 7),
        (1, 1, 257, 2, 96),
        (1, 49, 129, 1, 128),
        (1, 3, 15, 2, 160),
        (0, 4, 4, 2, 8),
        (2, 0, 4, 2, 8),
    )
    differentiable = (0, 1, 2)
    with_tangent = (0, 1, 2)

    def inputs(self, size, generator):
        batch, n, m, heads, head_dim = size
        return [
            torch.randn(batch, rows, heads, head_dim, generator=generator, dtype=torch.float64)
            for rows in (n, m, m)
        ]


@functools.cache  # a CUDA graph cannot hold the copy to the device
def offsets(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def packed(q, k, v, lengths_q, lengths_k):
    device = q.primal.device if isinstance(q, ops.Pair) else q.device
    q_rows, k_rows = offsets(lengths_q, device), offsets(lengths_k, device)
    return ops.attention(q, k, v, cu_seqlens_q=q_rows, cu_seqlens_k=k_rows)


def packed_reference(q, k, v, lengths_q, lengths_k):
    q_rows, k_rows = offsets(lengths_q, q.device), offsets(lengths_k, q.device)
    return ops.attention_reference(q, k, v, None, q_rows, k_rows)


class TestPackedAttention(ForwardBackward, Tangent, AttentionModes):
    """Sequences of different lengths in one batch; some have no queries, some no keys."""

    name = "attention"
    op = staticmethod(packed)
    reference = staticmethod(packed_reference)
    # (lengths of queries, lengths of keys, H, D)
    sizes = (
        ((3, 1, 5), (2, 4, 5), 2, 8),
        ((3, 0, 70, 2), (2, 5, 130, 0), 2, 72),
        ((4, 2), (0, 0), 1, 4),
        ((0, 0), (3, 1), 1, 4),
        ((), (), 1, 4),
    )
    differentiable = (0, 1, 2)
    with_tangent = (0, 1, 2)

    def inputs(self, size, generator):
        *lengths, heads, head_dim = size
        rows = (sum(lengths[0]), sum(lengths[1]), sum(lengths[1]))
        shapes = [(1, count, heads, head_dim) for count in rows]
        return [
            *(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes),
            *lengths,
        ]

    def assert_tangents(self, actual, inputs, tangents):
        if not any(inputs[4]):  # no keys: output and tangent are zero
            assert all(not t.any() for t in actual)
        else:
            super().assert_tangents(actual, inputs, tangents)


#: Of queries and keys. Of one key the exact gradients are zero, which no yardstick measures.
lengths = st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, *range(2, 10)])), max_size=6)


@settings(max_examples=60, deadline=None)
@given(lengths, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_every_mask_of_packed_sequences(lengths, dtype):
    generator = torch.Generator().manual_seed(len(lengths))
    lengths_q, lengths_k = zip(*lengths, strict=True) if lengths else ((), ())
    rows = (sum(lengths_q), sum(lengths_k), sum(lengths_k))
    operands = [torch.randn(1, n, 2, 8, generator=generator).to(dtype) for n in (*rows, *rows)]
    masks = (lengths_q, lengths_k)

    def derivatives(function, convert):
        qkv, tangents = tuple(map(convert, operands[:3])), tuple(map(convert, operands[3:]))
        results = torch.func.jvp(lambda *qkv: function(*qkv, *masks), qkv, tangents)
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = function(*leaves, *masks)
        return *results, *torch.autograd.grad(out, leaves, tangents[0])

    exact = derivatives(packed_reference, torch.Tensor.double)
    yardstick = derivatives(packed_reference, lambda x: x)
    for i, results in enumerate(
        zip(derivatives(packed, lambda x: x), exact, yardstick, strict=True)
    ):
        if dtype == torch.float64:  # the reference is exact itself, and no yardstick
            torch.testing.assert_close(*results[:2])
        else:
            assert_close(*results, 3, f"result {i}")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 400))
def test_tiles_of_any_size_give_the_same_tangent(n, m, tile):
    module = sys.modules["tim.ops._attention_tiled"]
    generator = torch.Generator().manual_seed(n + 10 * m)
    shapes = [(2, rows, 2, 4) for rows in (n, m, m)]
    qkv = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tangents = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    before = module.TILE_ELEMENTS
    try:
        module.TILE_ELEMENTS = {"cpu": tile}
        _, actual = torch.func.jvp(ops.attention, tuple(qkv), tuple(tangents))
        lse = module.log_sum_exp(qkv[0], qkv[1], 0.5)
    finally:
        module.TILE_ELEMENTS = before
    _, expected = torch.func.jvp(ops.attention_reference, tuple(qkv), tuple(tangents))
    torch.testing.assert_close(actual, expected)
    scores = torch.einsum("bnhd,bmhd->bhnm", *qkv[:2]) * 0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def value_tangent_and_gradients(function, inputs, tangents):
    """All results of a function of q, k, v, whose tangents also serve as gradients."""
    inputs, tangents = tuple(inputs), tuple(tangents)
    value, tangent = torch.func.jvp(function, inputs, tangents)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return value, tangent, *torch.autograd.grad(function(*leaves), leaves, tangents[0])


def assert_all_close(function, reference, inputs, tangents, gradients=None):
    """`gradients` is the yardstick of gradients, where that is not the reference."""

    def results(function, convert=lambda x: x):
        return value_tangent_and_gradients(function, map(convert, inputs), map(convert, tangents))

    exact, yardstick = results(reference, torch.Tensor.double), results(reference)
    if gradients is not None:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(gradients(*leaves), leaves, tangents[0])
        yardstick = (*yardstick[:2], *grads)
    names = ("value", "tangent", "dq", "dk", "dv")
    for name, *values in zip(names, results(function), exact, yardstick, strict=True):
        assert_close(*values, 3, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_large_logits(size, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 40, 2, 16, generator=generator).to(dtype) for _ in range(6)]
    inputs[0] *= size

    def flash(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)

    # Every backward pass from L has errors of L's last digit, which the formula has not, so their
    # yardstick is PyTorch's own.
    assert_all_close(ops.attention, ops.attention_reference, inputs[:3], inputs[3:], flash)


@pytest.mark.parametrize("backend", ["kernel", "sdpa"])
def test_huge_logits_do_not_overflow(backend):
    inputs = [torch.randn(1, 40, 2, 16) for _ in range(6)]
    inputs[0] *= 1e6

    def attention(q, k, v):
        return ops.attention(q, k, v, backend=backend)

    results = value_tangent_and_gradients(attention, inputs[:3], inputs[3:])
    assert all(result.isfinite().all() for result in results)
    torch.testing.assert_close(results[0], ops.attention_reference(*inputs[:3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_key_has_all_the_weight(dtype):
    q, k, v, t_q, t_k, t_v = (
        torch.randn(2, n, 2, 9).to(dtype) for n in (33, 1, 1, 33, 1, 1)
    )  # fmt: skip
    out, t_out, *gradients = value_tangent_and_gradients(ops.attention, (q, k, v), (t_q, t_k, t_v))
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(out, v.expand_as(out), rtol=ulp, atol=0)
    # The tangent of the weight is zero: what remains is the rounding of G v - sum(G) O.
    products = (t_q * k + q * t_k).sum(-1, keepdim=True).abs() / 3 * v.abs()
    assert ((t_out - t_v).abs() <= 2 * ulp * (products + t_v.abs() + v.abs())).all()
    exact = t_q.double().sum(1, keepdim=True)
    torch.testing.assert_close(gradients[2].double(), exact, rtol=4 * ulp, atol=33 * 4 * ulp)
    assert gradients[0].abs().max() < 32 * ulp and gradients[1].abs().max() < 32 * ulp * 33


def test_one_key_far_above_the_others():
    # The weights of the other tiles underflow to zero, before and after the largest score.
    q, v = torch.ones(1, 3, 1, 8), torch.randn(1, 500, 1, 8)
    k = torch.zeros(1, 500, 1, 8)
    k[:, 300] = 1e4
    out, t_out = torch.func.jvp(lambda q: ops.attention(q, k, v), (q,), (q,))
    torch.testing.assert_close(out, v[:, 300:301].expand(1, 3, 1, 8))
    # G v - sum(G) O is zero but for the rounding of G, which is as large as the score.
    score = 8 * 1e4 / math.sqrt(8)
    assert t_out.abs().max() <= 4 * torch.finfo(q.dtype).eps * score * v.abs().max()


def test_special_values_come_out_as_in_the_formula():
    q, k, v = (torch.randn(1, 20, 1, 8) for _ in range(3))
    k[0, 3] = float("nan")
    assert ops.attention(q, k, v).isnan().all()
    q, k, v = (torch.randn(1, 20, 1, 8) for _ in range(3))
    q[0, 5, 0, 0] = float("inf")
    out = ops.attention(q, k, v)
    assert out[0, 5].isnan().all()
    assert out.isnan().sum() == 8


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers [B, N, H, D] at other strides."""
    apart = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    apart[..., ::2] = x
    return {
        "heads first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "packed": torch.stack((x, torch.full_like(x, torch.nan)), 2)[:, :, 0],
        "numbers apart": apart[..., ::2],
        "tokens last": x.movedim(1, -1).contiguous().movedim(-1, 1),
    }


@pytest.mark.parametrize("name", layouts(torch.zeros(1, 1, 1, 1)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(name, dtype):
    inputs = [torch.randn(2, 21, 3, 12).to(dtype) for _ in range(6)]
    strided = [layouts(x)[name] for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    expected = value_tangent_and_gradients(ops.attention, inputs[:3], inputs[3:])
    actual = value_tangent_and_gradients(ops.attention, strided[:3], strided[3:])
    assert all(map(torch.equal, actual, expected))
    assert all(x.is_contiguous() for x in actual[:2])


def test_broadcast_inputs():
    q, k, v = (torch.randn(1, 5, 1, 8).expand(3, 5, 2, 8) for _ in range(3))
    inputs = [x.contiguous() for x in (q, k, v)]
    assert torch.equal(ops.attention(q, k, v), ops.attention(*inputs))


@pytest.mark.parametrize("shape", [(70000, 2, 1, 4), (1, 2, 70000, 4)], ids=str)
def test_more_heads_than_a_16_bit_number_counts(shape):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for _ in range(6)]
    assert_all_close(ops.attention, ops.attention_reference, inputs[:3], inputs[3:])


def test_default_scale():
    q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
    torch.testing.assert_close(
        ops.attention(q, k, v), ops.attention(q, k, v, scale=1 / math.sqrt(16))
    )


def test_bad_input():
    q = torch.ones(2, 3, 2, 4)
    with pytest.raises(ValueError, match=r"k must have shape \[B, M, H, D\] = \[2, M, 2, 4\]"):
        ops.attention(q, q[..., :3], q[..., :3])
    with pytest.raises(ValueError, match="v must have shape that of k"):
        ops.attention(q, q, q[:, :2])
    with pytest.raises(ValueError, match="M = 0"):
        ops.attention(q, q[:, :0], q[:, :0])
    known = "auto, kernel, sdpa, flash_attn, reference"
    with pytest.raises(ValueError, match=f"backend must be one of {known}, got 'fast'"):
        ops.attention(q, q, q, backend="fast")
    with pytest.raises(ValueError, match="max_seqlen_k must come with cu_seqlens, got 3 without"):
        ops.attention(q, q, q, max_seqlen_k=3)
    with pytest.raises(ValueError, match="q must have at least one number per head"):
        ops.attention(q[..., :0], q[..., :0], q[..., :0])
    with pytest.raises(TypeError, match="scale must be a number, got 'a'"):
        ops.attention(q, q, q, scale="a")
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        ops.attention(q, q, q, scale=math.nan)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "no kernel"])
def test_bad_packing(dtype, backend):
    q, rows = torch.ones(1, 3, 2, 4, dtype=dtype), torch.tensor([0, 3])

    def attempt(q=q, cu_seqlens_q=rows, cu_seqlens_k=rows, **more):
        rows = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        ops.attention(q, q, q, **rows, backend=backend, **more)

    attempt()
    attempt(q[:, :0], torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(TypeError, match="cu_seqlens_k must be a tensor, got list"):
        attempt(cu_seqlens_k=[0, 3])
    with pytest.raises(ValueError, match="needs packed inputs with B = 1, got B = 2"):
        attempt(torch.ones(2, 3, 2, 4, dtype=dtype))
    with pytest.raises(ValueError, match="cu_seqlens_k must be given together"):
        attempt(cu_seqlens_k=None)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must be an integer vector \[S \+ 1\]"):
        attempt(cu_seqlens_q=torch.tensor([0.0, 3.0]))
    with pytest.raises(ValueError, match="as many entries as cu_seqlens_q, 2, got 3"):
        attempt(cu_seqlens_k=torch.tensor([0, 1, 3]))
    for few in ([], [0]):
        with pytest.raises(ValueError, match="cu_seqlens_q must have at least two entries for 3 t"):
            attempt(cu_seqlens_q=torch.tensor(few, dtype=torch.int32), cu_seqlens_k=rows[:1])
    for bad in ([0, 4], [1, 3], [0, 2], [0, 2**32 + 3]):
        with pytest.raises(ValueError, match=r"cu_seqlens_k must ascend from 0 to 3, got \["):
            attempt(cu_seqlens_k=torch.tensor(bad))
    with pytest.raises(ValueError, match=r"must ascend from 0 to 3, got \[0, 2, 1, 3\]"):
        attempt(cu_seqlens_q=torch.tensor([0, 2, 1, 3]), cu_seqlens_k=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="max_seqlen_q must be at least 3, the longest, got 2"):
        attempt(max_seqlen_q=2)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"max_seqlen_k must be at least 1, got {wrong}"):
            attempt(max_seqlen_k=wrong)
    for wrong in ("a", 2.0, True):
        with pytest.raises(TypeError, match=f"max_seqlen_k must be an integer, got {wrong!r}"):
            attempt(max_seqlen_k=wrong)
