"""The cases of the emulator on a GPU, and tensors of more elements than 31 bits count."""

from __future__ import annotations

import pytest
import torch
from test_operations import CHECKS, CONTRACTS, LAYOUTS, SIZES, cases
from torch import Tensor

pytestmark = pytest.mark.gpu


@cases(SIZES)
def test_sizes_of_the_kernels(name, size, direction, dtype) -> None:
    getattr(CONTRACTS[name](), f"test_{direction}")(size, dtype, "cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@cases({name: [contract.sizes[2]] for name, contract in CONTRACTS.items()})
def test_layouts_that_wide_accesses_cannot_take(name, size, direction, dtype, layout) -> None:
    class LaidOut(CONTRACTS[name]):  # type: ignore[name-defined,misc]
        def prepare(self, size, dtype, device=None, seed=0):
            return tuple(
                [LAYOUTS[layout](t) if isinstance(t, Tensor) else t for t in tensors]
                for tensors in super().prepare(size, dtype, device, seed)
            )

    getattr(LaidOut(), f"test_{direction}")(size, dtype, "cuda")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_holds_for_any_kernel(check) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with torch.device("cuda"):
        check()


#: Of 2^16 to 2^20 elements; so often repeated along the batch, their first input has over 2^31.
#: Of both batches, one block adds up all tokens or positions of a sample.
LARGE = {
    "interpolate": ((4, 1 << 18), 2049),
    "swiglu": ((1024, 1024), 2049),
    "adaln": ((32, 8, 4096), 2049),
    "gated_adaln": ((32, 8, 4096), 2049),
    "qk_norm_rope": ((2, 64, 8, 72), 9800),
    "transition_loss": ((128, 4, 32, 64, 128), 2049),
    "transition_loss_difference": ((128, 4, 32, 64, 128), 2049),
    "attention": ((2, 96, 96, 8, 64), 21900),
}
ROOM = 70e9  # bytes, that the inputs and results of a backward pass have


@pytest.mark.parametrize("direction", ["forward", "backward", "tangent"])
@pytest.mark.parametrize("name", [name for name in LARGE if name in CONTRACTS])
def test_offsets_beyond_31_bits(name, direction) -> None:
    """The last samples of a huge batch have the results that they have alone."""
    contract = CONTRACTS[name]()
    device = contract.skip_unless("cuda", torch.bfloat16)
    if torch.cuda.mem_get_info()[0] < ROOM:
        pytest.skip(f"needs {ROOM / 1e9:.0f} GB of free memory")
    if direction == "tangent" and not contract.with_tangent:
        pytest.skip("no tangents")
    size, times = LARGE[name]
    batch = size[0]
    few, t_few = contract.prepare(size, torch.bfloat16, device)

    def repeated(values: list) -> list:
        return [
            t.repeat(times, *[1] * (t.dim() - 1))
            if isinstance(t, Tensor) and t.shape[0] == batch
            else t
            for t in values
        ]

    def run(inputs: list, tangents: list) -> tuple[Tensor, ...]:
        if direction == "forward":
            return contract.run(contract.op, inputs)
        if direction == "tangent":
            return contract.jvp(contract.op, inputs, tangents)[1]
        leaves = list(inputs)
        for i in contract.differentiable:
            leaves[i] = inputs[i].detach().requires_grad_()
        recorded = [out for out in contract.run(contract.op, leaves) if out.requires_grad]
        wanted = [leaves[i] for i in contract.differentiable if len(leaves[i]) % batch == 0]
        return torch.autograd.grad(recorded, wanted, [out.detach() for out in recorded])

    expected = run(few, t_few)
    many, t_many = repeated(few), repeated(t_few)
    assert many[0].numel() > 1 << 31
    actual = run(many, t_many)
    compared = 0
    for a, e in zip(actual, expected, strict=True):
        if len(e) == batch and len(a) == batch * times:
            assert torch.equal(a[-batch:], e) and torch.equal(a[:batch], e)
            compared += 1
    assert compared


def test_every_operation_has_a_large_case() -> None:
    assert CONTRACTS.keys() - LARGE.keys() <= {"packed_attention"}
