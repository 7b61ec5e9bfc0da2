import math

import pytest
import torch
from contract import ForwardBackward, Tangent
from modes import PairModes

from tim import ops

SIZES = ((2, 3, 10), (1, 1, 2), (2, 5, 48), (3, 16, 384), (0, 4, 8), (2, 0, 8), (2, 9, 1153))


class TestAdaln(ForwardBackward, Tangent, PairModes):
    name = "adaln"
    in_graph = ("adaln",)
    op = staticmethod(ops.adaln)
    reference = staticmethod(ops.adaln_reference)
    sizes = SIZES
    differentiable = (0, 1, 2)
    with_tangent = (0, 1, 2)

    def inputs(self, size, generator):
        batch, _, channels = size
        x = torch.randn(size, generator=generator, dtype=torch.float64) * 2 + 0.5
        packed = torch.randn(batch, 1, 2 * channels, generator=generator, dtype=torch.float64)
        return [x, *packed.chunk(2, dim=-1)]


class TestGatedAdaln(ForwardBackward, Tangent, PairModes):
    name = "adaln"
    in_graph = ("gated_adaln",)
    op = staticmethod(ops.gated_adaln)
    reference = staticmethod(ops.gated_adaln_reference)
    sizes = SIZES
    differentiable = (0, 1, 2, 3, 4)
    with_tangent = (0, 1, 2, 3, 4)

    def inputs(self, size, generator):
        batch, _, channels = size
        x, y = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
        packed = torch.randn(batch, 1, 3 * channels, generator=generator, dtype=torch.float64)
        return [x, y, *packed.chunk(3, dim=-1)]


def test_large_mean_does_not_cancel():
    x = torch.randn(2, 4, 256) + 1000
    zero = torch.zeros(2, 1, 256)
    exact = ops.adaln_reference(x.double(), zero.double(), zero.double())
    assert (ops.adaln(x, zero, zero) - exact).abs().max() < 1e-3


def test_small_rows_have_a_finite_tangent_in_float16():
    x, row = (1e-3 * torch.randn(1, 2, 16)).half(), torch.zeros(1, 1, 16).half()
    _, tangent = torch.func.jvp(lambda x: ops.adaln(x, row, row), (x,), (x,))
    assert tangent.isfinite().all()


def test_strided_inputs_and_wider_residual():
    x = torch.randn(3, 24, 8).mT
    shift, scale = torch.randn(3, 1, 96).bfloat16()[..., ::2].chunk(2, dim=-1)
    out = ops.adaln(x, shift, scale)
    assert out.dtype == torch.float32
    torch.testing.assert_close(
        out, ops.adaln_reference(x, shift.float(), scale.float()), rtol=1e-5, atol=1e-5
    )


def test_gradient_of_only_one_output_of_the_pair():
    x, y = (torch.randn(2, 5, 12, requires_grad=True) for _ in range(2))
    modulation = [torch.randn(2, 1, 12) for _ in range(3)]
    for output in (0, 1):
        actual = torch.autograd.grad(
            ops.gated_adaln(x, y, *modulation)[output].sum().square(), (x, y)
        )
        expected = torch.autograd.grad(
            ops.gated_adaln_reference(x, y, *modulation)[output].sum().square(), (x, y)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_the_same_for_any_number_of_threads():
    def gradients(threads: int):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        x, shift, scale = (
            torch.randn(shape, generator=generator, requires_grad=True)
            for shape in ((4, 64, 384), (4, 1, 384), (4, 1, 384))
        )
        ops.adaln(x, shift, scale).square().sum().backward()
        return x.grad, shift.grad, scale.grad

    before = torch.get_num_threads()
    try:
        for one, two in zip(gradients(1), gradients(2), strict=True):
            assert torch.equal(one, two)
    finally:
        torch.set_num_threads(before)


EPS = (
    ("x", TypeError, "eps must be a number, got 'x'"),
    (-1e-6, ValueError, "eps must be at least 0, got -1e-06"),
    (math.nan, ValueError, "eps must be finite, got nan"),
)


def test_bad_input():
    x, row = torch.ones(2, 3, 4), torch.ones(2, 1, 4)
    with pytest.raises(ValueError, match=r"x must have shape \[B, N, C\], got \[3, 4\]"):
        ops.adaln(x[0], row, row)
    with pytest.raises(ValueError, match=r"scale must have shape \[B, 1, C\] = \[2, 1, 4\]"):
        ops.adaln(x, row, row[:, 0])
    with pytest.raises(ValueError, match="y must have shape that of x"):
        ops.gated_adaln(x, x[:, :2], row, row, row)
    for eps, error, message in EPS:
        with pytest.raises(error, match=message):
            ops.adaln(x, row, row, eps=eps)
        with pytest.raises(error, match=message):
            ops.gated_adaln(x, x, row, row, row, eps=eps)
