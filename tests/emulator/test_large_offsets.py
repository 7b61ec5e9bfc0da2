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
#: Sizes of a few samples by direction; the size of the batch comes first.
FEW = {
    "interpolate": {"forward": (4, 4096)},
    "swiglu": dict.fromkeys(("forward", "tangent", "backward"), (4, 4096)),
    "adaln": {
        **dict.fromkeys(("forward", "tangent"), (2, 3, 8192)),
        "backward": (2, 3, 1152),
    },
    "gated_adaln": dict.fromkeys(("forward", "tangent", "backward"), (2, 3, 1152)),
    "qk_norm_rope": {
        **dict.fromkeys(("forward", "tangent"), (2, 5, 8, 72)),
        "backward": (2, 1, 32, 256),
    },
    "transition_loss": {"forward": (2, 32, 8, 16, 2), "backward": (2, 2, 512, 1024, 2)},
}
#: Rows of the largest grid: blocks of the passes over whole samples take every 65535th.
GRID_ROWS = 65535
CASES = [(name, direction) for name, sizes in FEW.items() for direction in sizes]
#: Of these only the very last block runs, as it has many samples. In qk_norm_rope it is that of k,
#: with a 512th of all tokens.
ONE_BLOCK = {("qk_norm_rope", "backward"), ("transition_loss", "backward")}


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
            sizes = shape if isinstance(shape[0], int) else shape[0]
            return reserved(tuple(sizes), dtype)

        def empty_like(tensor: Tensor, **_: object) -> Tensor:
            return reserved(tuple(tensor.shape), tensor.dtype)

        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        emulator.set_device(multiprocessors=1 << 28, max_grid_y=GRID_ROWS)
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


def results(
    contract: OpContract, direction: str, inputs: list, tangents: list, gradients: list
) -> tuple:
    if direction == "forward":
        return contract.run(contract.op, inputs)
    if direction == "tangent":
        return contract.jvp(contract.op, inputs, tangents)[1]
    leaves = list(inputs)
    for i in contract.differentiable:
        leaves[i] = inputs[i].detach().requires_grad_()
    outputs = [output for output in contract.run(contract.op, leaves) if output.requires_grad]
    return torch.autograd.grad(outputs, [leaves[i] for i in contract.differentiable], gradients)


def gradients_of(contract: OpContract, direction: str, inputs: list) -> list[Tensor]:
    """Of the outputs that have any, random."""
    if direction != "backward":
        return []
    leaves = [x.clone().requires_grad_() if i in contract.differentiable else x
              for i, x in enumerate(inputs)]  # fmt: skip
    outputs = [output for output in contract.run(contract.op, leaves) if output.requires_grad]
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]


@pytest.mark.parametrize(("name", "direction"), CASES)
def test_the_last_samples_of_a_huge_batch(name, direction) -> None:
    contract = CONTRACTS[name]()
    size = FEW[name][direction]
    batch = size[0]
    few, t_few = contract.prepare(size, torch.bfloat16)
    with emulated():
        g_few = gradients_of(contract, direction, few)
        expected = results(contract, direction, few, t_few, g_few)
    # Of a backward pass, the gradients of vectors for each sample stay below the limit.
    huge = [*g_few, few[contract.differentiable[0]]] if g_few else expected
    smallest = min(len(t) and t[0].numel() for t in huge if t.dim() > 1)
    samples = LIMIT // smallest + batch
    if samples > GRID_ROWS:  # so that the last row of a grid has the last sample
        samples = -(-samples // GRID_ROWS) * GRID_ROWS
    many, t_many, g_many = (extended(values, batch, samples) for values in (few, t_few, g_few))
    launched.clear()
    alone = (name, direction) in ONE_BLOCK
    with last_blocks(1 if alone else 64):
        actual = results(contract, direction, many, t_many, g_many)
    assert launched
    if alone:
        last, wanted = actual[0][-1], expected[0][-1]
        written = last != 0
        assert written.any() and torch.equal(last[written], wanted[written])
    else:
        for a, e in zip(actual, expected, strict=True):
            assert len(a) == samples and e.any()
            assert torch.equal(a[-batch:], e)
    # The blocks before have not run.
    assert not actual[0][0].any()
