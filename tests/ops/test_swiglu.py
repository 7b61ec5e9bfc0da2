import pytest
import torch
from contract import ForwardBackward, Tangent
from modes import PairModes

from tim import ops


class TestSwiglu(ForwardBackward, Tangent, PairModes):
    name = "swiglu"
    in_graph = ("swiglu",)
    op = staticmethod(ops.swiglu)
    reference = staticmethod(ops.swiglu_reference)
    sizes = ((3, 5), (1, 1), (2, 7, 24), (2, 16, 512), (0, 8), (5, 1027))
    differentiable = (0, 1)
    with_tangent = (0, 1)

    def inputs(self, size, generator):
        return [3 * torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_large_magnitudes_do_not_overflow():
    gate = torch.tensor([-200.0, -100.0, -88.0, 88.0, 200.0, 0.0, -0.0])
    torch.testing.assert_close(ops.swiglu(gate, torch.ones(7)), torch.nn.functional.silu(gate))


def test_nan_and_infinity_propagate():
    gate = torch.tensor([float("nan"), float("inf"), 1.0])
    out = ops.swiglu(gate, torch.tensor([1.0, 1.0, float("nan")]))
    assert out[0].isnan() and out[1].isinf() and out[2].isnan()


def test_halves_of_one_product_are_read_in_place():
    packed = torch.randn(6, 40)
    gate, up = packed.chunk(2, dim=-1)
    torch.testing.assert_close(ops.swiglu(gate, up), ops.swiglu_reference(gate, up))
    transposed = torch.randn(20, 6).T
    torch.testing.assert_close(ops.swiglu(transposed, up), ops.swiglu_reference(transposed, up))


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (
            torch.ones(2, 3),
            torch.ones(3, 2),
            ValueError,
            r"up must have the shape of gate, \[2, 3\]",
        ),
        (torch.ones(2, dtype=torch.int64), torch.ones(2), TypeError, "gate must have a floating"),
        ([1.0], torch.ones(1), TypeError, "gate must be a tensor, got list"),
        (
            torch.ones(2, dtype=torch.float8_e4m3fn),
            torch.ones(2),
            TypeError,
            "gate must have at least 16 bits per number, got torch.float8_e4m3fn",
        ),
        (
            torch.ones(2),
            torch.ones(2).to_sparse(),
            TypeError,
            "up must be a dense tensor, got torch.sparse_coo",
        ),
    ],
)
def test_bad_input(gate, up, error, message):
    with pytest.raises(error, match=message):
        ops.swiglu(gate, up)
