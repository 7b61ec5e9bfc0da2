import pytest
import torch
from contract import ForwardBackward, Tangent
from modes import PairModes

from tim import ops

GROUPS = 3


class TestGroupedLinear(ForwardBackward, Tangent, PairModes):
    """The same rows for all groups."""

    name = "grouped_linear"
    in_graph = ("grouped_linear",)
    # (rows, [groups,] columns in, columns out)
    sizes = ((4, 5, 6), (1, 1, 1), (3, 48, 33), (0, 4, 2))
    differentiable = tuple(range(1 + 2 * GROUPS))
    with_tangent = (0,)

    @staticmethod
    def op(x, *parameters):
        return ops.grouped_linear(x, parameters[:GROUPS], parameters[GROUPS:])

    @staticmethod
    def reference(x, *parameters):
        return ops.grouped_linear_reference(x, parameters[:GROUPS], parameters[GROUPS:])

    def has_kernel(self, device: str) -> bool:
        return True  # PyTorch's products

    def inputs(self, size, generator):
        *rows, columns, out = size
        shapes = [(*rows, columns), *[(out, columns)] * GROUPS, *[(out,)] * GROUPS]
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


class TestGroupedLinearOfGroups(TestGroupedLinear):
    """Own rows for each group."""

    sizes = ((4, GROUPS, 5, 6), (1, GROUPS, 1, 1), (3, GROUPS, 48, 33), (0, GROUPS, 4, 2))


def test_without_biases():
    x, weights = torch.randn(4, 5), [torch.randn(6, 5) for _ in range(2)]
    expected = torch.stack([x @ weight.T for weight in weights], dim=1)
    torch.testing.assert_close(ops.grouped_linear(x, weights), expected)


def test_bad_input():
    x, weight = torch.ones(4, 5), torch.ones(6, 5)
    with pytest.raises(ValueError, match="weights must not be empty"):
        ops.grouped_linear(x, [])
    with pytest.raises(ValueError, match=r"x must have shape \[B, K\] or \[B, G, K\] = \[4, 5\]"):
        ops.grouped_linear(torch.ones(4, 6), [weight])
    with pytest.raises(ValueError, match="biases must be as many as weights, 1, got 2"):
        ops.grouped_linear(x, [weight], [torch.ones(6)] * 2)
    with pytest.raises(ValueError, match=r"biases must have shape \[M\] = \[6\], got \[5\]"):
        ops.grouped_linear(x, [weight], [torch.ones(5)])
