"""Which kernels tim.ops.attention runs where all of those for GPUs are there, and with what."""

from __future__ import annotations

import functools

import pytest
import torch
from contract import assert_close
from emulated import emulated, launched
from torch import Tensor

from tim import ops
from tim.ops._attention_hopper import hopper, parse

BFLOAT16 = torch.bfloat16


def operands(
    head_dim: int = 64, dtype: torch.dtype = BFLOAT16, batch: int = 2
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """q, k, v and their tangents."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, 2, head_dim) for tokens in (20, 33, 33)]
    values = [torch.randn(s, generator=generator).to(dtype) for s in (*shapes, *shapes)]
    return tuple(values[:3]), tuple(values[3:])


def derivatives(function, qkv: tuple, tangents: tuple) -> tuple[Tensor, ...]:
    """Value, tangent and gradients, recorded and moving at once."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in qkv)
    out, t_out = torch.func.jvp(function, leaves, tangents)
    return out, t_out, *torch.autograd.grad(out, leaves, tangents[0])


@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
@pytest.mark.parametrize("backend", ["kernel", "sdpa"])
def test_value_tangent_and_gradients(backend, head_dim) -> None:
    qkv, tangents = operands(head_dim)
    launched.clear()
    with emulated():
        actual = derivatives(lambda *x: ops.attention(*x, backend=backend), qkv, tangents)
    tangent = "attention_dual" if backend == "kernel" else "attention_tangent"
    assert launched == [tangent, "attention_backward"]
    wide = [tuple(x.double() for x in some) for some in (qkv, tangents)]
    exact = derivatives(ops.attention_reference, *wide)
    yardstick = derivatives(ops.attention_reference, qkv, tangents)
    for i, values in enumerate(zip(actual, exact, yardstick, strict=True)):
        assert_close(*values, 2 if i == 0 else 3, f"result {i}")


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
def test_versions_for_hopper_run_where_they_are_chosen(choice) -> None:
    """Only by choice as long as nobody has measured them."""
    qkv, tangents = operands(72)
    launched.clear()
    with emulated() as emulator, hopper(choice):
        emulator.set_device(capability=90, shared_bytes=227 * 1024)
        actual = derivatives(lambda *x: ops.attention(*x, backend="sdpa"), qkv, tangents)
    version = "attention_tangent" + ("_hopper" if choice == "on" else "")
    assert launched == [version, "attention_backward"]
    wide = [tuple(x.double() for x in some) for some in (qkv, tangents)]
    exact = derivatives(ops.attention_reference, *wide)
    yardstick = derivatives(ops.attention_reference, qkv, tangents)
    for i, values in enumerate(zip(actual, exact, yardstick, strict=True)):
        assert_close(*values, 2 if i == 0 else 3, f"result {i}")


@pytest.mark.parametrize("choice", ["on", "off"])
def test_packed_sequences_keep_the_fused_pass(choice) -> None:
    """No version for Hopper takes them: it hands them on."""
    qkv, tangents = operands(64, batch=1)
    rows = torch.tensor([0, 9, 20]), torch.tensor([0, 30, 33])
    packed = functools.partial(ops.attention, cu_seqlens_q=rows[0], cu_seqlens_k=rows[1])
    launched.clear()
    with emulated() as emulator, hopper(choice):
        emulator.set_device(capability=90, shared_bytes=227 * 1024)
        derivatives(functools.partial(packed, backend="kernel"), qkv, tangents)
    dual = "attention_dual" + ("_hopper" if choice == "on" else "")
    assert launched == [dual, "attention_backward"]


@pytest.mark.parametrize("head_dim", [72, 96])
def test_one_pass_on_hopper_for_narrow_heads(head_dim) -> None:
    qkv, tangents = operands(head_dim)
    launched.clear()
    with emulated() as emulator, hopper("on"):
        emulator.set_device(capability=90, shared_bytes=227 * 1024)
        actual = derivatives(lambda *x: ops.attention(*x, backend="kernel"), qkv, tangents)
    passes = ["attention_hopper", "attention_tangent_hopper"]
    passes = ["attention_dual_hopper"] if head_dim == 72 else passes
    assert launched == [*passes, "attention_backward"]
    wide = [tuple(x.double() for x in some) for some in (qkv, tangents)]
    exact = derivatives(ops.attention_reference, *wide)
    yardstick = derivatives(ops.attention_reference, qkv, tangents)
    for i, values in enumerate(zip(actual, exact, yardstick, strict=True)):
        assert_close(*values, 2 if i == 0 else 3, f"result {i}")


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="TIM_HOPPER must be one of auto, on, off, got 'yes'"):
        parse("yes")


def test_each_direction_has_its_kernel() -> None:
    (q, k, v), (t_q, *_) = operands()
    launched.clear()
    with emulated():
        ops.attention(q, k, v)
        torch.func.jvp(lambda q: ops.attention(q, k, v), (q,), (t_q,))
        ops.attention(q.requires_grad_(), k, v).sum().backward()
    assert launched == ["attention", "attention_dual", "attention", "attention_backward"]


def test_pairs_move_the_last_samples_only() -> None:
    qkv, tangents = operands(batch=3)
    moving = tuple(t[1:] for t in tangents)
    launched.clear()
    with emulated():
        pairs = [ops.Pair(x, t) for x, t in zip(qkv, moving, strict=True)]
        out, t_out = ops.attention(*pairs)
    assert launched == ["attention", "attention_dual"]
    wide = tuple(x.double() for x in qkv)
    assert_close(out, ops.attention_reference(*wide), ops.attention_reference(*qkv), 2, "out")

    def last(values: tuple, tangents: tuple) -> Tensor:
        primals = tuple(x[1:] for x in values)
        return torch.func.jvp(ops.attention_reference, primals, tangents)[1]

    exact = last(wide, tuple(t.double() for t in moving))
    assert_close(t_out, exact, last(qkv, moving), 3, "tangent")


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"),
    [
        (80, BFLOAT16, r"compiled for head dimensions of 64, 72, 96 and 128, got \[2, 20, 2, 80\]"),
        (64, torch.float32, "takes bfloat16 and float16, got float32"),
    ],
    ids=["width", "dtype"],
)
def test_others_run_pytorch(head_dim, dtype, reason) -> None:
    qkv, tangents = operands(head_dim, dtype)
    launched.clear()
    with emulated():
        actual = derivatives(ops.attention, qkv, tangents)
        with pytest.raises(ValueError, match=f"'kernel' cannot take these inputs: .*{reason}"):
            ops.attention(*qkv, backend="kernel")
    assert launched == []
    wide = [tuple(x.double() for x in some) for some in (qkv, tangents)]
    exact = derivatives(ops.attention_reference, *wide)
    yardstick = derivatives(ops.attention_reference, qkv, tangents)
    for i, values in enumerate(zip(actual, exact, yardstick, strict=True)):
        assert_close(*values, 3, f"result {i}")
