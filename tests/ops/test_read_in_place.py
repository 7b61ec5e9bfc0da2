"""Views that networks hand over reach the kernels as they are, without a copy."""

import pytest
import torch
from torch import Tensor

from tim import ops
from tim.ops import _dispatch as dispatch


@pytest.fixture
def launched(monkeypatch) -> dict[str, set[int]]:
    """Addresses of the tensors that each kernel is given."""
    calls: dict[str, set[int]] = {}
    launch = dispatch.launch

    def record(name: str, *arguments: object) -> None:
        addresses = {a.data_ptr() for a in arguments if isinstance(a, Tensor)}
        calls[name] = addresses | {a for a in arguments if isinstance(a, int)}
        launch(name, *arguments)

    monkeypatch.setattr(dispatch, "launch", record)
    return calls


def every_direction(function, inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])
    torch.func.jvp(function, inputs, tangents)


def check(launched: dict, name: str, inputs: tuple, tangents: tuple, saved: tuple) -> None:
    """`saved` are the inputs that the backward kernel reads."""
    if name not in launched:
        pytest.skip(f"no kernel of {name} in this build")

    def addresses(*tensors: Tensor) -> set[int]:
        return {x.data_ptr() for x in tensors}

    assert addresses(*inputs) <= launched[name]
    assert addresses(*inputs, *tangents) <= launched[f"{name}_tangent"]
    assert addresses(*saved) <= launched[f"{name}_backward"]


def test_halves_of_a_projection(launched) -> None:
    inputs, tangents = (torch.randn(2, 6, 40).chunk(2, dim=-1) for _ in range(2))
    every_direction(ops.swiglu, inputs, tangents)
    check(launched, "swiglu", inputs, tangents, inputs)


def test_packed_queries_keys_and_values(launched) -> None:
    """The tokens of a part of a longer sequence."""
    inputs, tangents = ((torch.randn(2, 9, 3, 2, 8)[:, 2:7],) for _ in range(2))
    weight, bias, angles = torch.ones(8), torch.zeros(8), torch.ones(5, 8)
    every_direction(
        lambda qkv: ops.qk_norm_rope(qkv, weight, bias, weight, bias, angles, angles),
        inputs, tangents,
    )  # fmt: skip
    check(launched, "qk_norm_rope", inputs, tangents, inputs)


def test_parts_of_a_modulation(launched) -> None:
    def parts() -> tuple[Tensor, ...]:
        return torch.randn(2, 3, 6, 16)[:, 1].chunk(6, dim=1)[2:4]

    # PyTorch copies a tangent whose place in its memory is not that of its value.
    x, t_x = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    (shift, scale), moves = parts(), parts()
    every_direction(ops.adaln, (x, shift, scale), (t_x, *moves))
    check(launched, "adaln", (x, shift, scale), (t_x, *moves), (x, scale))


def test_heads_of_packed_projections(launched) -> None:
    inputs, tangents = (torch.randn(2, 5, 3, 2, 64).unbind(2) for _ in range(2))
    every_direction(lambda q, k, v: ops.attention(q, k, v, backend="kernel"), inputs, tangents)
    launched["attention_tangent"] = launched.get("attention_dual", set())
    check(launched, "attention", inputs, tangents, inputs)
