"""How wide the kernels' accesses are, and how many rows a block takes.

Told by the emulator's errors: memory that ends too early makes the access at its end fail, whose
width and thread the message names.
"""

from __future__ import annotations

import emulated as emulator
import pytest
import torch
from contract import DTYPES
from test_operations import CONTRACTS, offset
from torch import Tensor

from tim import ops

pytestmark = pytest.mark.skipif(
    emulator.SANITIZE == "ON", reason="the sanitizers look for other faults"
)
#: Whose rows are whole packs of 16 bytes in every dtype.
SIZES = {
    "interpolate": (2, 4, 16, 16),
    "swiglu": (2, 3, 256),
    "adaln": (2, 3, 1152),
    "gated_adaln": (2, 3, 1152),
    "qk_norm_rope": (2, 5, 3, 72),
    "transition_loss": (2, 8, 8, 8, 1),
    "transition_loss_difference": (2, 8, 8, 8, 1),
}
SMALL = 512  # elements of tables and parameters, which are float32 whatever the dtype
CASES = [
    (name, direction)
    for name in SIZES
    for direction in ("forward", "backward", "tangent")
    if hasattr(CONTRACTS[name], f"test_{direction}")
]


@pytest.fixture
def cut_short(monkeypatch):
    """Called, it ends all but the smallest arrays before their last byte."""
    extent = emulator.extent

    def shorter(tensor: Tensor) -> int:
        return extent(tensor) - (tensor.numel() > SMALL)

    return lambda: monkeypatch.setattr(emulator, "extent", shorter)


def run(name: str, direction: str, dtype: torch.dtype, cut_short, place=lambda t: t) -> None:
    contract = CONTRACTS[name]()
    values = contract.prepare(SIZES[name], dtype)
    inputs, tangents = ([place(t) if isinstance(t, Tensor) else t for t in v] for v in values)
    with emulator.emulated(place):
        if direction != "backward":
            cut_short()
        if direction == "forward":
            contract.run(contract.op, inputs)
        elif direction == "tangent":
            contract.jvp(contract.op, inputs, tangents)
        else:
            for i in contract.differentiable:
                inputs[i].requires_grad_()
            outputs = [out for out in contract.run(contract.op, inputs) if out.requires_grad]
            gradients = [place(torch.randn_like(out)) for out in outputs]
            cut_short()
            torch.autograd.grad(outputs, [inputs[i] for i in contract.differentiable], gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "direction"), CASES)
def test_aligned_arrays_are_accessed_16_bytes_at_a_time(name, direction, dtype, cut_short) -> None:
    with pytest.raises(RuntimeError, match=r"(reads|writes) 16 bytes of .* out of bounds") as error:
        run(name, direction, dtype, cut_short)
    assert ("_backward of" in str(error.value)) == (direction == "backward")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "direction"), CASES)
def test_other_arrays_are_accessed_value_by_value(name, direction, dtype, cut_short) -> None:
    width = f"{dtype.itemsize} bytes of"
    with pytest.raises(RuntimeError, match=rf"(reads|writes) {width} .* out of bounds"):
        run(name, direction, dtype, cut_short, offset)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 4), (torch.float32, 2)], ids=str)
def test_a_block_takes_several_rows_of_1152(dtype, rows, monkeypatch) -> None:
    extent = emulator.extent
    monkeypatch.setattr(emulator, "extent", lambda x: extent(x) - (x.numel() == rows * 1152))
    x, row = torch.randn(1, rows, 1152).to(dtype), torch.zeros(1, 1, 1152, dtype=dtype)
    with (
        emulator.emulated(),
        pytest.raises(
            RuntimeError, match=rf"block \(0, 0, 0\), thread \(\d+, {rows - 1}, 0\) reads"
        ),
    ):
        ops.adaln(x, row, row)
