"""The tangent and the gradients from every forward pass that a GPU has, L included."""

from __future__ import annotations

import math

import pytest
import torch
from contract import assert_close
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tim import ops
from tim.ops import _attention_forward as forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
each_width = pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
each_length = pytest.mark.parametrize("tokens", [(64, 64), (256, 77), (100, 257)], ids=str)


def operands(head_dim: int, tokens: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and their tangents."""
    generator = torch.Generator().manual_seed(0)
    n, m = tokens
    shapes = [(2, rows, 3, head_dim) for rows in (n, m, m)]
    values = [torch.randn(s, generator=generator) for s in (*shapes, *shapes)]
    return [x.to(dtype).cuda() for x in values]


def derivatives(function, values: list[Tensor]) -> tuple[Tensor, ...]:
    """Value, tangent and gradients; the tangent of q is also the gradient of the output."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in values[:3])
    out, t_out = torch.func.jvp(function, leaves, tuple(values[3:]))
    return out, t_out, *torch.autograd.grad(out, leaves, values[3])


def check(values: list[Tensor], backend: str) -> None:
    actual = derivatives(lambda *qkv: ops.attention(*qkv, backend=backend), values)
    exact = derivatives(ops.attention_reference, [x.double() for x in values])
    yardstick = derivatives(ops.attention_reference, values)
    for i, results in enumerate(zip(actual, exact, yardstick, strict=True)):
        assert_close(*results, 2 if i == 0 else 3, f"result {i}")


@pytest.fixture(params=BACKENDS)
def sdpa(request):
    with sdpa_kernel(BACKENDS[request.param]):
        yield BACKENDS[request.param]


@each_dtype
@each_length
@each_width
def test_every_backend_of_pytorch(sdpa, head_dim, tokens, dtype) -> None:
    values = operands(head_dim, tokens, dtype)
    heads_first = [x.transpose(1, 2) for x in values[:3]]
    if torch._fused_sdp_choice(*heads_first, None, 0.0, False) != sdpa.value:
        pytest.skip("PyTorch does not take these inputs there")
    scale = 1 / math.sqrt(head_dim)
    _, lse = forward.by_sdpa(*values[:3], scale)
    q, k = (x.double() for x in values[:2])
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())
    check(values, "sdpa")


@each_dtype
@each_length
@each_width
@pytest.mark.parametrize("backend", ["auto", "kernel", "flash_attn"])
def test_other_sources(backend, head_dim, tokens, dtype) -> None:
    values = operands(head_dim, tokens, dtype)
    if backend == "flash_attn" and forward.why_no_flash_attn(values[0]) is not None:
        pytest.skip(forward.why_no_flash_attn(values[0]))
    check(values, backend)


@each_width
def test_runs_are_the_same_bit_for_bit(head_dim) -> None:
    values = operands(head_dim, (300, 300), torch.bfloat16)
    first, second = (
        derivatives(lambda *qkv: ops.attention(*qkv, backend="kernel"), values) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
