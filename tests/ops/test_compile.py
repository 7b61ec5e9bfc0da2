"""Operations chained as in a block, through inductor: the same as in eager mode."""

import shutil

import pytest
import torch

from tim import ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")


def block(x, y, row, qkv, weight, bias, cos, sin):
    h, normed = ops.gated_adaln(x, y, row, row, row)
    q, k, v = ops.qk_norm_rope(
        (qkv + ops.linear(normed, weight)).unflatten(-1, (3, 2, 8)),
        bias, bias, bias, bias, cos, sin,
    )  # fmt: skip
    out = ops.attention(q, k, v).flatten(2)
    return ops.adaln(h + out, row, row) + ops.swiglu(out, h)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 16), (2, 5, 16), (2, 1, 16), (2, 5, 48), (48, 16), (8,), (5, 8), (5, 8))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_jvp_inside_and_outside_of_inductor(inputs):
    x, y, row, *rest = inputs
    t = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def value_and_tangent(function, x, y, row):
        return torch.func.jvp(
            lambda x, row: function(x, y, row, *rest), (x, row), (t, torch.ones_like(row))
        )

    expected = value_and_tangent(block, x, y, row)
    assert expected[1].abs().max() > 0
    torch._dynamo.reset()
    inside = torch.compile(lambda *a: value_and_tangent(block, *a), fullgraph=True)(x, y, row)
    outside = value_and_tangent(torch.compile(block), x, y, row)
    for actual in (inside, outside):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_gradients_through_inductor(inputs):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)

    def gradients(function):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs[:6]]
        function(*leaves, *inputs[6:]).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    torch.testing.assert_close(gradients(compiled), gradients(block), rtol=1e-3, atol=1e-4)
