"""Tensor core products, loads of matrices and asynchronous copies, against float64."""

import pytest
import torch
from emulated import module

DTYPES = {torch.bfloat16: 1, torch.float16: 2}


@pytest.mark.parametrize("transposed", [False, True], ids=["b", "b_transposed"])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_tiles_is_the_product(dtype, depth, transposed) -> None:
    planted = module("tim_planted")
    steps = 3
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, steps * depth, generator=generator).to(dtype)
    b = torch.randn(steps * depth, 8, generator=generator).to(dtype)
    given = b.T.contiguous() if transposed else b
    out = torch.full((16, 8), torch.nan)
    arrays = [(t.data_ptr(), t.nbytes) for t in (a, given, out)]
    planted.set_memory(arrays)
    addresses = [address for address, _ in arrays]
    planted.multiply(*addresses, steps, depth, DTYPES[dtype], transposed)
    planted.set_memory([])
    # Products of halves are exact in float32; only their sums round.
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)
