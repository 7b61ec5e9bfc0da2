"""The attention kernels of CPUs and the sources of the forward pass, called below tim.ops."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from contract import assert_close
from torch import Tensor

from tim import _extension, ops
from tim.ops import _attention_forward as forward
from tim.ops import _attention_kernels as kernels
from tim.ops import _dispatch as dispatch

if _extension.kernels("cpu") is None:
    pytest.skip(_extension.REASON or "no CPU kernels", allow_module_level=True)
C = _extension.kernels("cpu")


def random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.einsum("bnhd,bmhd->bhnm", q, k) * scale


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("subset", [*itertools.product([False, True], repeat=3)][1:], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["attention_dual", "attention_tangent"])
def test_log_sum_exp_and_every_subset_of_tangents(name, dtype, subset, scale):
    batch, n, m, heads, head_dim = 2, 50, 33, 2, 20
    shapes = [(batch, rows, heads, head_dim) for rows in (n, m, m)]
    *qkv, t_q, t_k, t_v = random(*shapes, *shapes, dtype=dtype)
    tangents = [t if there else None for t, there in zip((t_q, t_k, t_v), subset, strict=True)]
    out, lse = kernels._forward(*qkv, None, None, n, m, scale, "kernel")
    t_out, t_lse = torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)
    results = [t.data_ptr() for t in (out, lse)]
    moving = [dispatch.pointer(t) for t in tangents]
    operands = [x.data_ptr() for x in qkv]
    order = (*moving, 0, 0, *results) if name == "attention_dual" else (*results, *moving, 0, 0)
    getattr(C, name)(
        *operands, *order, t_out.data_ptr(), t_lse.data_ptr(),
        *(kernels._strides(x) for x in (*qkv, *tangents)),
        batch, n, m, heads, head_dim, 0, n, m, scale, dispatch.DTYPE_CODES[dtype], 1,
    )  # fmt: skip

    def function(q, k, v):
        return ops.attention_reference(q, k, v, scale), scores(q, k, scale).logsumexp(-1)

    def derivative(convert):
        primals = tuple(map(convert, qkv))
        moves = tuple(
            torch.zeros_like(x) if t is None else convert(t)
            for x, t in zip(primals, tangents, strict=True)
        )
        return torch.func.jvp(function, primals, moves)

    exact, yardstick = derivative(Tensor.double), derivative(lambda x: x)
    assert_close(out, exact[0][0], yardstick[0][0], 2, "out")
    assert_close(t_out, exact[1][0], yardstick[1][0], 3, "tangent of out")
    assert_close(lse, exact[0][1], yardstick[0][1], 2, "lse")
    assert_close(t_lse, exact[1][1], yardstick[1][1], 3, "tangent of lse")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(threads, dtype):
    # Queries that end in the middle of a block, and more of them than one task takes.
    inputs = random(*[(1, rows, 3, 40) for rows in (213, 150, 150, 213, 150, 150)], dtype=dtype)

    def results() -> list[Tensor]:
        qkv, tangents = tuple(inputs[:3]), tuple(inputs[3:])
        results = list(torch.func.jvp(ops.attention, qkv, tangents))
        leaves = [x.clone().requires_grad_() for x in qkv]
        return results + list(torch.autograd.grad(ops.attention(*leaves), leaves, tangents[0]))

    threads(1)
    expected = results()
    for count in (2, 5, 16):
        threads(count)
        assert all(map(torch.equal, results(), expected))


def test_a_kernel_without_tangents_is_refused():
    with pytest.raises(ValueError, match="at least one of t_q, t_k, t_v"):
        C.attention_dual(
            *[8] * 3, *[0] * 5, *[8] * 3, 0, *[(1, 1, 1)] * 6, 1, 1, 1, 1, 8, 0, 1, 1, 1.0, 0, 1
        )
    with pytest.raises(TypeError):
        C.attention(*[8] * 3, 0, 0, 8, 8, (1, 1), *[(1, 1, 1)] * 2, *[1] * 8, 1.0, 0, 1)


def test_log_sum_exp_of_pytorch_is_that_of_the_scores():
    q, k, v = random((2, 20, 3, 8), (2, 9, 3, 8), (2, 9, 3, 8))
    out, lse = forward.by_sdpa(q, k, v, 0.4)
    torch.testing.assert_close(out, ops.attention_reference(q, k, v, 0.4))
    torch.testing.assert_close(lse, scores(q, k, 0.4).logsumexp(-1))
    assert lse.is_contiguous() and out.is_contiguous()


def test_a_log_sum_exp_that_is_missing_or_of_another_shape_is_computed():
    q, k = random((2, 20, 3, 8), (2, 9, 3, 8))
    expected = scores(q, k, 0.4).logsumexp(-1)
    column = expected[..., None]  # as cuDNN's
    for given in (None, expected[..., :16], expected.double(), expected, column):
        torch.testing.assert_close(forward._checked(given, q, k, 0.4), expected)
    assert forward._checked(column + 1, q, k, 0.4).sub(1).sub(expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["kernel", "sdpa", "reference"])
def test_the_tangent_is_that_of_every_forward_pass(backend, dtype):
    shapes = [(2, rows, 2, 24) for rows in (40, 21, 21)]
    *qkv, t_q, t_k, t_v = random(*shapes, *shapes, dtype=dtype)

    def results(function, convert=lambda x: x):
        primals = tuple(convert(x).requires_grad_() for x in qkv)
        out, t_out = torch.func.jvp(function, primals, tuple(map(convert, (t_q, t_k, t_v))))
        return out, t_out, *torch.autograd.grad(out, primals, convert(t_q))

    actual = results(lambda *qkv: ops.attention(*qkv, backend=backend))
    exact, yardstick = (
        results(ops.attention_reference, Tensor.double),
        results(ops.attention_reference),
    )
    for i, values in enumerate(zip(actual, exact, yardstick, strict=True)):
        assert_close(*values, 3, f"result {i}")
    assert not actual[1].requires_grad


def test_pairs_have_tangents_of_the_last_samples_with_every_backend():
    shapes = [(3, rows, 2, 24) for rows in (10, 7, 7)]
    q, k, v, t_q, t_k, _ = random(*shapes, *shapes)
    for tangents in ((t_q[1:], t_k[1:], None), (None, t_k[2:], None), (t_q, t_k, None)):
        size = next(len(t) for t in tangents if t is not None)
        operands = [
            x if t is None else ops.Pair(x, t) for x, t in zip((q, k, v), tangents, strict=True)
        ]
        last = [x[3 - size :] for x in (q, k, v)]
        moves = tuple(
            torch.zeros_like(x) if t is None else t for x, t in zip(last, tangents, strict=True)
        )
        _, expected = torch.func.jvp(ops.attention_reference, tuple(last), moves)
        for backend in ("auto", "kernel", "sdpa", "reference"):
            out, t_out = ops.attention(*operands, backend=backend)
            torch.testing.assert_close(out, ops.attention_reference(q, k, v))
            torch.testing.assert_close(t_out, expected, rtol=1e-4, atol=1e-5)


def test_what_a_forced_backend_cannot_take_is_said():
    q = torch.ones(1, 3, 2, 4)
    with pytest.raises(ValueError, match="'kernel' cannot take these inputs: cpu kernels take"):
        ops.attention(*[q.double()] * 3, backend="kernel")
    with ops.reference_only(), pytest.raises(ValueError, match="TIM_KERNELS=off"):
        ops.attention(q, q, q, backend="kernel")
    with pytest.raises(ValueError, match="flash_attn runs on CUDA devices, got cpu"):
        ops.attention(q, q, q, backend="flash_attn")


def test_kernels_run_where_they_can(monkeypatch):
    q = torch.ones(1, 3, 2, 4)
    called = []
    launch = dispatch.launch
    monkeypatch.setattr(
        dispatch, "launch", lambda name, *rest: (called.append(name), launch(name, *rest))
    )
    ops.attention(q, q, q)
    torch.func.jvp(ops.attention, (q, q, q), (q, q, q))
    ops.attention(q.requires_grad_(), q, q).sum().backward()
    assert called == ["attention", "attention_dual", "attention", "attention_backward"]
    torch.func.jvp(lambda q: ops.attention(q, q, q, backend="sdpa"), (q.detach(),), (q.detach(),))
    assert called[4:] == ["attention_tangent"]
    ops.attention(*[q.double()] * 3)
    assert len(called) == 5


# flash-attn's interfaces: what they ask for to give L, and what they return then.


def flash_2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
    out, lse = forward.by_sdpa(q, k, v, softmax_scale)
    return (out, lse, None) if return_attn_probs else out


def flash_3(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
    out, lse = forward.by_sdpa(q, k, v, softmax_scale)
    return (out, lse) if return_attn_probs else out


def flash_3_of_2024(q, k, v, softmax_scale=None, causal=False):
    return forward.by_sdpa(q, k, v, softmax_scale)


def flash_4(q, k, v, softmax_scale=None, causal=False, return_lse=False):
    out, lse = forward.by_sdpa(q, k, v, softmax_scale)
    return out, (lse if return_lse else None)


def without_lse(q, k, v, softmax_scale=None, causal=False):
    return forward.by_sdpa(q, k, v, softmax_scale)[0]


@pytest.mark.parametrize("function", [flash_2, flash_3, flash_3_of_2024, flash_4, without_lse])
def test_every_interface_of_flash_attn(function, monkeypatch):
    q, k, v = random((2, 20, 3, 8), (2, 9, 3, 8), (2, 9, 3, 8))
    module = SimpleNamespace(flash_attn_func=function)
    monkeypatch.setattr(forward, "flash_module", lambda capability: module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    out, lse = forward.by_flash_attn(q, k, v, 0.4, None, None, 20, 9)
    torch.testing.assert_close(out, ops.attention_reference(q, k, v, 0.4))
    torch.testing.assert_close(lse, scores(q, k, 0.4).logsumexp(-1))


def test_packed_sequences_go_to_flash_attn_whole(monkeypatch):
    q, k, v = random((1, 7, 3, 8), (1, 9, 3, 8), (1, 9, 3, 8))
    rows = (torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([0, 5, 9], dtype=torch.int32))
    given = {}

    def varlen(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False, **packed):
        given.update(packed)
        parts = [
            forward.by_sdpa(q[None, a:b], k[None, c:d], v[None, c:d], softmax_scale)
            for (a, b), (c, d) in zip(*(itertools.pairwise(r.tolist()) for r in rows), strict=True)
        ]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 1)[0], torch.cat(lses, 2)[0], None

    module = SimpleNamespace(flash_attn_varlen_func=varlen)
    monkeypatch.setattr(forward, "flash_module", lambda capability: module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    out, lse = forward.by_flash_attn(q, k, v, 0.4, *rows, 4, 5)
    assert list(given) == ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (4, 5)
    expected, expected_lse = kernels._forward(q, k, v, *rows, 4, 5, 0.4, "kernel")
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    module.flash_attn_varlen_func = lambda q, k, v, **_: q
    with pytest.raises(NotImplementedError, match="gives no log-sum-exp of packed sequences"):
        forward.by_flash_attn(q, k, v, 0.4, *rows, 4, 5)


def test_the_module_of_flash_attn_fits_the_device(monkeypatch):
    modules = {
        name: SimpleNamespace(flash_attn_func=print, flash_attn_varlen_func=print)
        for name in ("flash_attn_interface", "flash_attn.cute", "flash_attn")
    }

    def import_module(name: str):
        if name not in modules:
            raise ImportError(name)
        return modules[name]

    monkeypatch.setattr(forward.importlib, "import_module", import_module)
    found = forward.flash_module.__wrapped__
    assert found((9, 0)) is modules["flash_attn_interface"]
    assert found((10, 0)) is modules["flash_attn.cute"]
    assert found((8, 6)) is modules["flash_attn"]
    assert found((7, 5)) is None
    del modules["flash_attn_interface"], modules["flash_attn.cute"]
    assert found((9, 0)) is modules["flash_attn"]


def test_exponentials_are_within_two_ulp():
    # One key has the score zero, another x: the weights are 1 / (1 + e^x) and e^x / (1 + e^x).
    x = torch.linspace(-80, 0, 200_001)
    q = torch.stack((x, torch.zeros_like(x)), -1)[None, :, None]
    k = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, :, None]
    v = torch.tensor([[0.0, 0.0], [1.0, 0.0]])[None, :, None]
    weight = ops.attention(q, k, v, scale=1.0)[0, :, 0, 0].double()
    exact = torch.sigmoid(x.double())
    # The argument of the power is rounded once, which counts |x| / 2 ulp of the result.
    ulp = torch.finfo(torch.float32).eps * (2 + x.double().abs() / 2 * math.log2(math.e))
    assert ((weight - exact).abs() <= ulp * exact).all()


@pytest.mark.filterwarnings("ignore:Input .* is not a double precision")
@pytest.mark.parametrize("sizes", [(2, 5, 3, 2, 8), (1, 19, 4, 1, 12)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_in_float32(sizes, packed):
    """Gradient and tangent of the kernels against differences of the kernels' own values."""
    batch, n, m, heads, head_dim = sizes
    inputs = random(*[(1 if packed else batch, rows, heads, head_dim) for rows in (n, m, m)])
    rows = {}
    if packed:
        rows = {
            "cu_seqlens_q": torch.tensor([0, 2, 2, n]),
            "cu_seqlens_k": torch.tensor([0, 2, 3, m]),
        }

    def function(*qkv: Tensor) -> Tensor:
        return ops.attention(*qkv, **rows, backend="kernel")

    # The step that is best for central differences, and ten times the error that they have then.
    ulp = torch.finfo(torch.float32).eps
    assert torch.autograd.gradcheck(
        function, [x.requires_grad_() for x in inputs], check_forward_ad=True,
        eps=ulp ** (1 / 3), atol=10 * ulp ** (2 / 3), rtol=0,
    )  # fmt: skip


#: (B, N, M, H, D), and who computes the forward and the backward pass in float32.
CHOICES = {
    (2, 1, 40, 2, 24): ("torch", "torch"),
    (2, 3, 40, 2, 24): ("torch", "kernel"),
    (2, 4, 40, 2, 24): ("kernel", "kernel"),
    (2, 3, 15, 2, 24): ("kernel", "kernel"),
    (2, 20, 1, 2, 24): ("kernel", "torch"),
    (1, 200, 200, 1, 256): ("kernel", "torch"),
    (1, 200, 200, 2, 256): ("kernel", "kernel"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", CHOICES, ids=str)
def test_pytorch_computes_what_it_was_measured_to_be_faster_for(size, dtype, monkeypatch):
    batch, n, m, heads, head_dim = size
    qkv = random(*[(batch, rows, heads, head_dim) for rows in (n, m, m)], dtype=dtype)
    launched = []
    launch = dispatch.launch
    monkeypatch.setattr(
        dispatch, "launch", lambda name, *rest: (launched.append(name), launch(name, *rest))
    )
    ops.attention(*[x.requires_grad_() for x in qkv]).sum().backward()
    wanted = CHOICES[size] if dtype == torch.float32 else ("kernel", "kernel")
    names = ("attention", "attention_backward")
    assert launched == [name for name, who in zip(names, wanted, strict=True) if who == "kernel"]
