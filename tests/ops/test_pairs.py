"""Values with tangents beside them, and the operations that take them."""

import pytest
import torch
from torch import Tensor

from tim import ops
from tim.bench.cases import OPERATIONS, Size
from tim.ops import Pair, pairs

SIZE = Size("tiny", 3, 5, 2, 8, 24, (2, 3, 3), 3)
MOVING = [operation for operation in OPERATIONS if operation.with_tangent]


def numbers(*shape: int, wide: bool = False) -> Tensor:
    return torch.randn(shape, dtype=torch.float32)


def outputs(results) -> list:
    return [results] if isinstance(results, (Tensor, Pair)) else list(results)


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("samples", [3, 1])
@pytest.mark.parametrize("operation", MOVING, ids=lambda operation: operation.name)
def test_operations_give_the_derivative_of_the_last_samples(operation, samples, kernels) -> None:
    torch.manual_seed(0)
    inputs = operation.inputs(SIZE, numbers)
    moving = [inputs[i] for i in operation.with_tangent]
    tangents = [torch.randn(samples, *tensor.shape[1:]) for tensor in moving]

    def of_last(*last: Tensor):
        arguments = list(inputs)
        for i, tensor in zip(operation.with_tangent, last, strict=True):
            arguments[i] = tensor
        return tuple(outputs(operation.reference(*arguments)))

    last = tuple(tensor[3 - samples :] for tensor in moving)
    arguments = list(inputs)
    for i, tangent in zip(operation.with_tangent, tangents, strict=True):
        arguments[i] = Pair(inputs[i], tangent)
    with ops.kernels(kernels):
        results = outputs(operation.op(*arguments))
    _, expected = torch.func.jvp(of_last, last, tuple(tangents))
    for pair, value, tangent in zip(
        results, outputs(operation.reference(*inputs)), expected, strict=True
    ):
        torch.testing.assert_close(pair.primal, value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pair.tangent, tangent, rtol=1e-4, atol=1e-5)
        assert pair.tangent.abs().max() > 0


@pytest.mark.parametrize("operation", MOVING, ids=lambda operation: operation.name)
def test_gradients_are_those_of_the_values(operation) -> None:
    torch.manual_seed(0)
    inputs = operation.inputs(SIZE, numbers)
    first = inputs[0].clone().requires_grad_()
    plain = outputs(operation.op(first, *inputs[1:]))
    pair = outputs(operation.op(Pair(first, torch.randn_like(first)), *inputs[1:]))
    (expected,) = torch.autograd.grad(sum(out.sin().sum() for out in plain), first)
    (actual,) = torch.autograd.grad(sum(out.primal.sin().sum() for out in pair), first)
    torch.testing.assert_close(actual, expected)
    assert not any(out.tangent.requires_grad for out in pair)


def test_operands_are_promoted_together_and_joined_again() -> None:
    x, half, t = torch.ones(2, 3), torch.ones(2, 3).bfloat16(), torch.ones(1, 3).bfloat16()
    primals, tangents = pairs.split_promoted(Pair(half, t), x)
    assert [p.dtype for p in primals] == [torch.float32] * 2
    assert tangents[0].dtype == torch.float32 and tangents[1] is None
    first, second = pairs.join(primals, tangents)
    assert isinstance(first, Pair) and first.tangent is tangents[0]
    assert second is primals[1]
    assert pairs.promote(Pair(x, x), x)[0].tangent is x


def test_tangents_that_do_not_fit_are_refused() -> None:
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"same samples, got \[1, 2\]"):
        pairs.split(Pair(x, x[:1]), Pair(x, x[:2]))
    for tangent in (torch.ones(4, 4), torch.ones(3, 5)):
        with pytest.raises(ValueError, match=r"last samples of \[3, 4\], got shape"):
            pairs.split(Pair(x, tangent))
    with pytest.raises(ValueError, match="at least one tensor"):
        pairs.count((None, None))
