"""Tensor core products and loads of tiles: against float64, and lane by lane as PTX has them."""

import pytest
import torch
from emulated import module

DTYPES = {torch.bfloat16: 1, torch.float16: 2}
LANES = [(lane // 4, lane % 4) for lane in range(32)]


def call(function: str, *arguments: torch.Tensor | int | bool) -> None:
    kernels = module("tim_test_kernels")
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    kernels.set_memory([(t.data_ptr(), t.nbytes) for t in tensors])
    try:
        getattr(kernels, function)(
            *[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        )
    finally:
        kernels.set_memory([])


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("transposed", [False, True], ids=["b", "b_transposed"])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_tiles_is_the_product(dtype, depth, transposed) -> None:
    steps = 3
    a, b = random((16, steps * depth), dtype), random((steps * depth, 8), dtype)
    out = torch.full((16, 8), torch.nan)
    given = b.T.contiguous() if transposed else b
    call("multiply", a, given, out, steps, depth, DTYPES[dtype], transposed)
    # Products of halves are exact in float32; only their sums round.
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registers_of_a_product_lie_as_in_ptx(dtype, depth) -> None:
    a, b, c = random((16, depth), dtype), random((depth, 8), dtype), random((16, 8), torch.float32)
    # Element i of lane 4 g + t, "Matrix Fragments for mma.m16n8k16" and "m16n8k8" of the PTX ISA:
    # a: row g, or g + 8 for i in 2, 3, 6, 7; column 2 t + i % 2, 8 more from i = 4 on;
    # b: row 2 t + i % 2, 8 more from i = 2 on; column g;
    # c and d: row g, or g + 8 from i = 2 on; column 2 t + i % 2.
    a_lanes = [
        [a[g + i // 2 % 2 * 8, 2 * t + i % 2 + i // 4 * 8] for i in range(depth // 2)]
        for g, t in LANES
    ]
    b_lanes = [[b[2 * t + i % 2 + i // 2 * 8, g] for i in range(depth // 4)] for g, t in LANES]
    d_index = [[(g + i // 2 * 8, 2 * t + i % 2) for i in range(4)] for g, t in LANES]
    d = torch.tensor([[c[at] for at in lane] for lane in d_index])
    call("multiply", torch.tensor(a_lanes, dtype=dtype), torch.tensor(b_lanes, dtype=dtype), d, 0,
         depth, DTYPES[dtype], False)  # fmt: skip
    exact = c.double() + a.double() @ b.double()
    expected = torch.tensor([[exact[at] for at in lane] for lane in d_index])
    torch.testing.assert_close(d.double(), expected.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_registers_of_a_load_lie_as_in_ptx(tiles, transposed) -> None:
    values = torch.arange(tiles * 64, dtype=torch.int16).view(tiles, 8, 8)
    out = torch.zeros(32, tiles, 2, dtype=torch.int16)
    call("load", values, out, tiles, transposed)
    # ldmatrix: lane 4 g + t receives elements 2 t and 2 t + 1 of row g, of column g with .trans.
    source = values.mT if transposed else values
    for lane, (g, t) in enumerate(LANES):
        assert torch.equal(out[lane], source[:, g, 2 * t : 2 * t + 2])
