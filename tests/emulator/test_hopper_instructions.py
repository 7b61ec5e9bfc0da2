"""Products of a warpgroup and copies of boxes: element by element as the PTX ISA has them."""

import pytest
import torch
from emulated import SANITIZE, module

DTYPES = {torch.bfloat16: 1, torch.float16: 2}
#: Codes of the permutations ("Matrix Descriptor Format") and their widths in bytes.
SWIZZLES = {"none": (0, 16), "128": (1, 128), "64": (2, 64), "32": (3, 32)}
UNIT = 16  # bytes


def call(function: str, *arguments: object) -> object:
    kernels = module("tim_test_kernels")
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    kernels.set_device(shared_bytes=227 * 1024)
    kernels.set_memory([(t.data_ptr(), t.nbytes) for t in tensors])
    try:
        return getattr(kernels, function)(
            *[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        )
    finally:
        kernels.set_device()
        kernels.set_memory([])


def permuted(unit: int, width: int) -> int:
    """Where Swizzle<B, 4, 3> of the PTX ISA puts a unit: its lowest B bits are combined with those
    three places higher. B is 3 for 128 bytes, 2 for 64, 1 for 32."""
    bits = {16: 0, 32: 1, 64: 2, 128: 3}[width]
    return unit ^ (unit >> 3 & (1 << bits) - 1)


def image_of(
    b: torch.Tensor, transposed: bool, width: int, start: int, leading: int, stride: int
) -> torch.Tensor:
    """Shared memory, rows of 16 bytes, that holds B [16, columns] in the canonical layout.

    "Strides" of the PTX ISA, in units of 16 bytes, W units to a row of the permutation:
    columns of B are rows: ((8, n), 2) : ((W, stride), 1), without one ((8, n), 2) : ((1, stride),
    leading); rows of B are rows: ((W, n), (8, k)) : ((1, leading), (W, stride)), without one
    ((1, n), (8, k)) : ((-, stride), (1, leading)).
    """
    image = torch.full((4096, 8), torch.nan, dtype=b.dtype)
    w = width // UNIT
    lead, strd = leading // UNIT, stride // UNIT
    depth, columns = b.shape
    if transposed:
        for k in range(depth):
            for n in range(columns // 8):
                place = n % w + n // w * lead + k % 8 * w + k // 8 * strd
                if width == UNIT:
                    place = n * strd + k % 8 + k // 8 * lead
                image[permuted(start // UNIT + place, width)] = b[k, 8 * n : 8 * n + 8]
    else:
        for column in range(columns):
            for k in range(depth // 8):
                place = column % 8 * w + column // 8 * strd + (lead if width == UNIT else 1) * k
                image[permuted(start // UNIT + place, width)] = b[8 * k : 8 * k + 8, column]
    return image


LAYOUTS = [
    # transposed, permutation, columns, start, leading, stride
    *[(False, "128", columns, start, 16, 1024) for columns in (8, 32, 64) for start in (0, 96)],
    (False, "128", 64, 8192 + 32, 16, 2048),
    *[(False, "64", columns, start, 16, 512) for columns in (8, 64) for start in (0, 32)],
    (False, "32", 64, 256, 16, 256),
    *[(False, "none", columns, 128, 2048, 128) for columns in (8, 32, 64)],
    (False, "none", 64, 0, 128, 256),
    *[(True, "128", columns, 4096, 16, 1024) for columns in (8, 32, 64)],
    (True, "64", 32, 1024, 16, 512),
    (True, "64", 64, 1024, 8192, 512),
    (True, "32", 64, 512, 4096, 256),
    (True, "none", 8, 256, 128, 16),
    (True, "none", 64, 256, 128, 1024),
]


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    ("transposed", "swizzle", "columns", "start", "leading", "stride"), LAYOUTS
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_a_warpgroup_lies_as_in_ptx(
    dtype, transposed, swizzle, columns, start, leading, stride, adds
) -> None:
    generator = torch.Generator().manual_seed(columns)
    a = torch.randn(64, 16, generator=generator).to(dtype)
    b = torch.randn(16, columns, generator=generator).to(dtype)
    c = torch.randn(64, columns, generator=generator)
    code, width = SWIZZLES[swizzle]
    image = image_of(b, transposed, width, start, leading, stride)
    # "Register Fragments for wgmma.mma_async.m64nNk16", of thread 32 w + 4 g + t:
    # a: row 16 w + g, 8 more for i in 2, 3, 6, 7; column 2 t + i % 2, 8 more from i = 4 on;
    # d: row 16 w + g, 8 more for i % 4 in 2, 3; column 2 t + i % 2 + 8 (i / 4).
    threads = [(n // 32, n % 32 // 4, n % 4) for n in range(128)]
    given = torch.stack(
        [
            torch.stack([a[16 * w + g + i // 2 % 2 * 8, 2 * t + i % 2 + i // 4 * 8]
                         for i in range(8)])
            for w, g, t in threads
        ]
    )  # fmt: skip
    index = torch.tensor(
        [
            [
                (16 * w + g + i // 2 % 2 * 8) * columns + 2 * t + i % 2 + i // 4 * 8
                for i in range(columns // 2)
            ]
            for w, g, t in threads
        ]
    )
    d = c.flatten()[index].contiguous() if adds else torch.full(index.shape, torch.nan)
    call("warpgroup_product", image, len(image), given, d, (start, leading, stride, code), adds,
         columns, transposed, DTYPES[dtype])  # fmt: skip
    exact = a.double() @ b.double() + (c.double() if adds else 0)
    torch.testing.assert_close(d.double(), exact.flatten()[index], rtol=1e-6, atol=1e-5)


#: Sizes of a tensor, of the box, and where it begins, the innermost dimension first.
BOXES = {
    "inside": ((72, 20, 2, 3), (8, 16, 1, 1), (16, 2, 1, 2)),
    "several": ((64, 20, 2, 3), (64, 8, 2, 2), (0, 4, 0, 1)),
    "beyond the tokens": ((64, 20, 2, 3), (64, 16, 1, 1), (0, 12, 1, 0)),
    "beyond the width": ((72, 20, 2, 3), (16, 16, 1, 1), (64, 2, 1, 1)),
    "outside": ((72, 20, 2, 3), (8, 16, 1, 1), (72, 0, 1, 1)),
    "before": ((64, 20, 2, 3), (16, 16, 1, 1), (-8, -3, 0, 0)),
}


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_a_box_lies_as_in_ptx(swizzle, name) -> None:
    sizes, box, at = BOXES[name]
    code, width = SWIZZLES[swizzle]
    if width != UNIT and box[0] * 2 > width:
        box = (width // 2, *box[1:])
    tensor = torch.randn(sizes[::-1], generator=torch.Generator().manual_seed(0)).half()
    strides = tensor.stride()[2::-1]
    expected = tensor
    for i, (first, extent, size) in enumerate(zip(at[::-1], box[::-1], sizes[::-1], strict=True)):
        index = torch.arange(first, first + extent)
        there = ((index >= 0) & (index < size)).view([-1 if d == i else 1 for d in range(4)])
        expected = expected.index_select(i, index.clamp(0, size - 1)).where(there, 0)
    expected = expected.reshape(-1, 8)
    out = torch.full(expected.shape, torch.nan, dtype=tensor.dtype)
    assert call("copied_box", tensor, out, sizes, strides, box, at, code)
    order = [permuted(i, width) for i in range(len(expected))]
    assert torch.equal(out[order], expected)


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": (0, 4, 1, 1)},
        {"strides": (12, 64, 64)},
        {"box": (12, 4, 1, 1)},
        {"box": (8, 257, 1, 1)},
        {"box": (64, 4, 1, 1), "swizzle": 2},
    ],
    ids=str,
)
def test_maps_that_the_driver_refuses(change) -> None:
    tensor, out = torch.zeros(64 * 300).half(), torch.zeros(64 * 300).half()
    options = {"sizes": (64, 4, 2, 2), "strides": (64, 256, 512), "box": (8, 4, 1, 1),
               "at": (0, 0, 0, 0), "swizzle": 0} | change  # fmt: skip
    assert not call("copied_box", tensor, out, *options.values())


#: What the emulator says of each planted fault of hopper_faults.cu.
FAULTS = {
    "ring_no_wait": r"thread \(\d+, 0, 0\) reads 16 bytes of shared memory at \w+: (the block has "
    r"not written there|the cp.async of thread \(128, 0, 0\) to there has not been waited for)",
    "ring_early_release": r"thread \(128, 0, 0\) writes 16 bytes .*: a race with the wgmma of "
    r"thread \(\d+, 0, 0\), which may not have read there yet, at .*hopper_faults.cu:",
    "ring_no_release": r"waits at an mbarrier .* for ever",
    "ring_no_empty_wait": "arrives at an mbarrier in whose phase all 1 have arrived",
    "ring_no_fence": "calls wgmma without a wgmma.fence since its registers were last free",
    "ring_no_product_wait": r"a race with the wgmma of thread \(\d+, 0, 0\), which may not have",
    "ring_few_bytes": "waits at an mbarrier .* for ever",
    "ring_many_bytes": "waits at an mbarrier .* for ever",
    "ring_many_arrivals": r"arrives at an mbarrier in whose phase all 1 have arrived",
    "ring_no_init": "the block has not written there",
    "ring_no_barrier": "the block has not written there|a race with thread",
    "ring_misaligned": "copies a box to an address that is no multiple of 128",
    "ring_unrounded": "calls wgmma with rows that do not begin at a multiple of 1024",
    "ring_not_awaited": "waits at an mbarrier .* for ever|ends before a copy of a box has arrived",
    "ring_ordinary_read": "to there has not been waited for|a race with thread",
}


def run(name: str, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = module("tim_test_kernels")
    x = torch.arange(1.0, 193.0)
    out = torch.full_like(x, torch.nan)
    kernels.set_device(order=order)
    kernels.set_memory([(t.data_ptr(), t.nbytes) for t in (x, out)])
    try:
        getattr(kernels, name)(x.data_ptr(), out.data_ptr())
    finally:
        kernels.set_device()
        kernels.set_memory([])
    return x, out


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_healthy_ring_runs_in_any_order(order) -> None:
    x, out = run("ring", order)
    assert torch.equal(out, x.view(3, 8, 8).sum((0, 2)).repeat(24))


@pytest.mark.skipif(SANITIZE == "ON", reason="the sanitizers look for other faults")
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_of_a_ring_is_found_in_any_order(name, order) -> None:
    with pytest.raises(RuntimeError, match=rf"{name}: ring<.*, block .*({FAULTS[name]})"):
        run(name, order)
