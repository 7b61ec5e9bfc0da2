import pytest
import torch
from contract import assert_close
from modes import Modes

from properties import given, st
from tim import ops


class TestInterpolate(Modes):
    name = "interpolate"
    in_graph = ("interpolate",)
    in_recorded_graph = ()
    op = staticmethod(ops.interpolate)
    reference = staticmethod(ops.interpolate_reference)
    sizes = ((3, 4, 5, 7), (1, 1), (2, 4, 32, 32), (0, 4, 2, 2), (5, 4099))
    differentiable = (0, 1, 2)

    def inputs(self, size, generator):
        x, z = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
        return [x, z, torch.randn(size[0], 4, generator=generator, dtype=torch.float64)]

    def test_forward(self, size, dtype, path):
        device = self.skip_unless(path, dtype)
        inputs, _ = self.prepare(size, dtype, device)
        inputs[2] = inputs[2].float()
        exact = self.run(self.reference, inputs, wide=True)
        yardstick = self.run(self.reference, inputs)
        with self.on(path):
            actual = self.run(self.op, inputs)
        for a, e, y in zip(actual, exact, yardstick, strict=True):
            assert a.dtype == dtype and a.is_contiguous()
            assert_close(a, e, y, 2, "output")

    def test_inputs_that_want_gradients_run_the_reference(self):
        inputs, _ = self.prepare(self.sizes[0], torch.float32)
        for tensor in inputs:
            tensor.requires_grad_()
        a, b = ops.interpolate(*inputs)
        (a.sum() + b.square().sum()).backward()
        assert all(tensor.grad.abs().sum() > 0 for tensor in inputs)


@given(st.integers(0, 4), st.integers(0, 70), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_size_equals_the_reference(batch, length, dtype):
    generator = torch.Generator().manual_seed(batch * 100 + length)
    x, z = (torch.randn(batch, length, generator=generator).to(dtype) for _ in range(2))
    coefficients = torch.randn(batch, 4, generator=generator)
    for actual, expected in zip(
        ops.interpolate(x, z, coefficients),
        ops.interpolate_reference(x, z, coefficients),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_strided_inputs():
    x, z = torch.randn(6, 4, 8).mT, torch.randn(3, 8, 8)[:, ::2]
    coefficients = torch.randn(4, 6).T
    z = torch.cat((z, z))[:, :, :4].mT.reshape(6, 4, 4).repeat(1, 2, 1)
    for actual, expected in zip(
        ops.interpolate(x, z, coefficients),
        ops.interpolate_reference(x, z, coefficients),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_a_tangent_is_refused():
    x, z, c = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 4)
    with pytest.raises(NotImplementedError, match="interpolate has no forward-mode rule"):
        torch.func.jvp(lambda x: ops.interpolate(x, z, c)[0], (x,), (x,))
    with pytest.raises(NotImplementedError, match="interpolate has no forward-mode rule"):
        torch.compile(
            lambda x: torch.func.jvp(lambda x: ops.interpolate(x, z, c)[0], (x,), (x,)),
            backend="eager",
        )(x)


def test_bad_input():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"coefficients must have shape \[B, 4\] = \[2, 4\]"):
        ops.interpolate(x, x, torch.ones(2, 3))
    with pytest.raises(ValueError, match="z must have shape the shape of x"):
        ops.interpolate(x, torch.ones(3, 2), torch.ones(2, 4))
