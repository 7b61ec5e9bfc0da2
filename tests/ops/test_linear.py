import torch
import torch.nn.functional as F
from modes import PairModes

from tim import ops


class TestLinear(PairModes):
    """PyTorch's own product: on every device, and no operation of ours in a graph."""

    name = "linear"
    op = staticmethod(ops.linear)
    reference = staticmethod(F.linear)
    # ([..., columns in], columns out)
    sizes = (((4, 5), 3), ((2, 7, 48), 33), ((0, 4), 2))
    differentiable = (0, 1, 2)
    with_tangent = (0,)

    def has_kernel(self, device: str) -> bool:
        return True

    def inputs(self, size, generator):
        rows, out = size
        shapes = (rows, (out, rows[-1]), (out,))
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    def expected_in_graph(self, path: str, recorded: bool) -> set[str]:
        return set()


def test_equals_pytorch_in_value_gradient_and_tangent():
    x, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    weight, bias = torch.randn(4, 5, requires_grad=True), torch.randn(4, requires_grad=True)

    def value_gradient_tangent(linear):
        out, t_out = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (t,))
        gradients = torch.autograd.grad(out.square().sum(), (x, weight, bias))
        return out, t_out.detach(), *gradients

    actual, expected = map(value_gradient_tangent, (ops.linear, F.linear))
    torch.testing.assert_close(actual, expected)


def test_the_tangent_keeps_no_graph():
    layer = torch.nn.Linear(5, 4)
    x = torch.randn(3, 5)
    out, t_out = torch.func.jvp(lambda x: ops.linear(x, layer.weight, layer.bias), (x,), (x,))
    assert out.requires_grad and not t_out.requires_grad and t_out.abs().max() > 0


def test_a_tangent_of_the_weight_is_exact():
    x, weight, t = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4, 5)
    _, t_out = torch.func.jvp(lambda weight: ops.linear(x, weight), (weight,), (t,))
    torch.testing.assert_close(t_out, x @ t.T)


def test_autocast_casts_value_and_tangent():
    layer, x = torch.nn.Linear(5, 4), torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out, t_out = torch.func.jvp(lambda x: ops.linear(x, layer.weight), (x,), (x,))
    assert out.dtype == t_out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad.abs().max() > 0
