"""The CPU kernels beyond the contract of tests/ops: rounding, special values, threads, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tim import _extension
from tim.ops import gated_adaln, interpolate, qk_norm_rope, swiglu

if _extension.kernels("cpu") is None:
    pytest.skip(_extension.REASON or "no CPU kernels", allow_module_level=True)
C = _extension.kernels("cpu")
SPECIAL = [0.0, -0.0, 88.9, -88.9, 1e30, -1e30, float("inf"), -float("inf"), float("nan")]


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_every_bfloat16_is_read_and_written_like_torch_does():
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = codes.view(torch.bfloat16)[None]
    for factor in (1.0, 1.00390625, 0.7, 1e-3, 3e4):
        table = torch.tensor([[factor, 0.0, -factor, 0.0]])
        a, b = interpolate(x, torch.zeros_like(x), table)
        assert same(a, (factor * x.float()).bfloat16())
        assert same(b, (-factor * x.float()).bfloat16())


def test_silu_is_within_three_ulp():
    x = torch.linspace(-87, 88, 200_001)
    exact = x.double() * torch.sigmoid(x.double())
    ulp = torch.finfo(torch.float32).eps * 2.0 ** torch.floor(torch.log2(exact.abs()))
    error = (swiglu(x, torch.ones_like(x)).double() - exact).abs()
    assert (error[exact != 0] <= 3 * ulp[exact != 0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_values_come_out_as_in_torch(dtype):
    x = torch.tensor(SPECIAL, dtype=dtype)
    assert same(swiglu(x, torch.ones_like(x)), torch.nn.functional.silu(x))
    gate, up = x.clone().requires_grad_(), torch.ones_like(x).requires_grad_()
    swiglu(gate, up).sum().backward()
    assert gate.grad[-1].isnan()
    assert up.grad[-1].isnan()
    assert gate.grad[:6].isfinite().all()


def test_one_nan_stays_in_its_row():
    x, y = torch.randn(2, 3, 40), torch.randn(2, 3, 40)
    gate, shift, scale = torch.randn(3, 2, 1, 40)
    y[1, 2, 7] = float("nan")
    h, out = gated_adaln(x, y, gate, shift, scale)
    assert h.isnan().sum() == 1
    assert out[1, 2].isnan().all()
    assert out.isnan().sum() == 40


def test_weight_gradients_do_not_depend_on_the_number_of_threads(threads):
    def gradients() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        qkv = [random(2, 70, 3, 4, 24), *(random(24) for _ in range(4))]
        qkv = [tensor.requires_grad_() for tensor in qkv]
        outputs = qk_norm_rope(*qkv, random(70, 24), random(70, 24))
        return torch.autograd.grad(outputs, qkv, [random(2, 70, 4, 24)] * 3)

    actual = gradients()
    torch.set_num_threads(3)
    assert all(map(torch.equal, actual, gradients()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 8, 8, 8, 1, 1, 0, 1), "interpolate: x must be the address of an array, got 0"),
        ((8, 8, 8, 8, 8, -1, 1, 0, 1), "interpolate: batch must not be negative, got -1"),
        ((8, 8, 8, 8, 8, 1, 1, 2, 1), "dtype must be 0 (float32) or 1 (bfloat16) on a CPU, got 2"),
        ((8, 8, 8, 8, 8, 1, 1, 0, 0), "where must be a number of threads, at least 1"),
    ],
)
def test_the_extension_refuses(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        C.interpolate(*arguments)


def test_the_extension_takes_null_pointers_where_there_is_nothing():
    C.interpolate(0, 0, 0, 0, 0, 0, 16, 0, 1)


def test_odd_head_dimensions_and_mixed_dtypes_are_refused():
    with pytest.raises(ValueError, match="qk_norm_rope: head_dim must be even"):
        C.qk_norm_rope(*[8] * 10, 1, 1, 1, 3, 9, 9, 1e-5, 0, 1)
    with pytest.raises(ValueError, match="transition_loss: data_dtype must be dtype, or 0"):
        C.transition_loss_backward(8, 8, 8, 8, 1, 1, 1, True, 0, 1, 1)


def test_the_kernels_carry_their_parameter_names():
    assert "gate_stride" in C.swiglu.__doc__
    assert "where" in C.swiglu.__doc__
