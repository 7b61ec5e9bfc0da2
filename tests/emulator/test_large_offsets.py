"""Tensors of more elements than 31 bits count, of which only the last are in memory.

Their other pages are reserved and never touched: of each launch the emulator runs the last blocks
alone. So offsets that overflow are found without a GPU, and without its memory.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from contract import OpContract
from emulated import SANITIZE, emulated, launched
from test_operations import CONTRACTS
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux"),
    pytest.mark.skipif(SANITIZE == "ON", reason="the sanitizers keep a shadow of all this memory"),
]
LIMIT = 1 << 31
#: Directions and sizes of a few samples; the size of the batch comes first.
FEW = {
    "interpolate": (("forward",), (4, 4096)),
    "swiglu": (("forward", "tangent", "backward"), (4, 4096)),
    "adaln": (("forward", "tangent"), (2, 3, 8192)),
    "gated_adaln": (("forward", "tangent"), (2, 3, 1152)),
    "qk_norm_rope": (("forward", "tangent"), (2, 5, 8, 72)),
    "transition_loss": (("forward",), (2, 4, 32, 32, 2)),
}
CASES = [(name, direction) for name, (directions, _) in FEW.items() for direction in directions]


def reserved(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    count = torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, max(count, 1) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


@contextmanager
def last_blocks(count: int) -> Iterator[None]:
    """On a device so large that each warp has one item, run the last blocks of every launch."""
    with emulated() as emulator, pytest.MonkeyPatch.context() as patch:

        def empty(*shape, dtype=torch.float32, **_: object) -> Tensor:
            return reserved(tuple(torch.Size(shape[0] if len(shape) == 1 else shape)), dtype)

        def empty_like(tensor: Tensor, **_: object) -> Tensor:
            return reserved(tuple(tensor.shape), tensor.dtype)

        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        emulator.set_device(multiprocessors=1 << 28)
        emulator.run_last_blocks(count)
        try:
            yield
        finally:
            emulator.run_last_blocks()


def extended(values: list, batch: int, samples: int) -> list:
    """Zeros in front of each tensor of `batch` samples, up to `samples`."""
    longer = []
    for value in values:
        if isinstance(value, Tensor) and len(value) == batch:
            more = reserved((samples, *value.shape[1:]), value.dtype)
            more[-batch:] = value
            value = more
        longer.append(value)
    return longer


def results(contract: OpContract, direction: str, inputs: list, tangents: list) -> tuple:
    if direction == "forward":
        return contract.run(contract.op, inputs)
    if direction == "tangent":
        return contract.jvp(contract.op, inputs, tangents)[1]
    leaves = list(inputs)
    for i in contract.differentiable:
        leaves[i] = inputs[i].detach().requires_grad_()
    outputs = contract.run(contract.op, leaves)
    wanted = [leaves[i] for i in contract.differentiable]
    return torch.autograd.grad(outputs, wanted, [inputs[contract.differentiable[0]]])


@pytest.mark.parametrize(("name", "direction"), CASES)
def test_the_last_samples_of_a_huge_batch(name, direction) -> None:
    contract = CONTRACTS[name]()
    size = FEW[name][1]
    batch = size[0]
    few, t_few = contract.prepare(size, torch.bfloat16)
    with emulated():
        expected = results(contract, direction, few, t_few)
    smallest = min(len(t) and t[0].numel() for t in expected if t.dim() > 1)
    samples = LIMIT // smallest + batch
    many, t_many = (extended(values, batch, samples) for values in (few, t_few))
    launched.clear()
    with last_blocks(64):
        actual = results(contract, direction, many, t_many)
    assert launched
    for a, e in zip(actual, expected, strict=True):
        assert len(a) == samples and e.any()
        assert torch.equal(a[-batch:], e)
    # The blocks before have not run.
    assert not actual[0][0].any()
