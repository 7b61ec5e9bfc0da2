"""The CUDA kernels of attention, on the emulator and, where there is one, on a GPU."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    DEVICES,
    DTYPES,
    HEAD_DIMS,
    LAYOUTS,
    SUBSETS,
    Emulator,
    Gpu,
    check,
    launches,
    make_case,
    odd_strides,
    run,
)

KERNELS = ("attention", "attention_tangent", "attention_dual", "attention_backward")
#: Those that split columns where there are few rows.
SPLIT = KERNELS[:3]
LENGTHS = [(1, 1), (17, 64), (100, 1), (64, 100), (1, 200), (130, 17)]
#: Lengths of packed sequences, of queries and of keys.
PACKED = {
    "equal": ((16, 16, 16), (16, 16, 16)),
    "mixed": ((3, 0, 40, 1, 0, 129), (5, 7, 0, 70, 0, 17)),
    "empty": ((0, 0, 5), (0, 0, 5)),
    "one": ((33,), (65,)),
    "many": ((1,) * 40 + (0,) * 10 + (2,), (1,) * 40 + (3,) * 10 + (2,)),
}
BFLOAT16 = torch.bfloat16

on_both = pytest.mark.parametrize(
    "machine",
    [
        pytest.param(Emulator(), id="emulator"),
        pytest.param(
            Gpu(),
            id="gpu",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
            ],
        ),
    ],
)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_width = pytest.mark.parametrize("head_dim", HEAD_DIMS)


def packed_case(name: str, longest: str, head_dim: int, **options: object):
    lengths = PACKED[name]
    offsets = tuple((0, *torch.tensor(side).cumsum(0).tolist()) for side in lengths)
    known = tuple(map(max, lengths)) if longest == "known" else None
    sizes = tuple(side[-1] for side in offsets)
    return make_case(head_dim, BFLOAT16, *sizes, offsets=offsets, longest=known, **options)


@on_both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_width
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@each_kernel
def test_lengths(kernel, lengths, head_dim, dtype, machine) -> None:
    check(machine, kernel, make_case(head_dim, dtype, *lengths))


@on_both
@each_width
@each_kernel
def test_samples_and_heads(kernel, head_dim, machine) -> None:
    check(machine, kernel, make_case(head_dim, BFLOAT16, 20, 33, batch=2, heads=3))


@pytest.mark.parametrize("device", DEVICES)
@each_width
@each_kernel
def test_sizes_of_the_device(kernel, head_dim, device) -> None:
    """More rows than a block has, and more tokens than all stages hold."""
    case = make_case(head_dim, BFLOAT16, 270 if kernel == "attention_backward" else 140, 270)
    check(Emulator(**DEVICES[device]), kernel, case)


@on_both
@pytest.mark.parametrize("longest", ["known", "unknown"])
@pytest.mark.parametrize("name", PACKED)
@each_kernel
def test_packed_sequences(kernel, name, longest, machine) -> None:
    check(machine, kernel, packed_case(name, longest, 72, heads=2))


@on_both
@pytest.mark.parametrize("layout", LAYOUTS)
@each_width
@each_kernel
def test_layouts(kernel, head_dim, layout, machine) -> None:
    case = make_case(head_dim, BFLOAT16, 21, 35, batch=2, heads=2, layout=LAYOUTS[layout])
    check(machine, kernel, case)


@on_both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kernel
def test_large_scores(kernel, dtype, machine) -> None:
    """Up to some hundreds, where the exponential of an unshifted score overflows."""
    results = check(machine, kernel, make_case(64, dtype, 40, 150, size=100.0))
    assert all(bool(x.isfinite().all()) for x in results.values())


@on_both
@each_kernel
def test_scores_of_keys_that_are_not_there_do_not_matter(kernel, machine) -> None:
    """All scores far below zero, the score of the zeros behind the last key."""
    case = make_case(64, BFLOAT16, 16, 17, size=0.0)
    case.q += 100.0
    case.k -= 10.0
    results = check(machine, kernel, case)
    assert all(bool(x.isfinite().all()) for x in results.values())


@on_both
@pytest.mark.parametrize("scale", [-0.125, 0.0, 1.0])
@each_kernel
def test_scales(kernel, scale, machine) -> None:
    case = make_case(64, BFLOAT16, 16, 17)
    case.scale = scale
    check(machine, kernel, case)


@on_both
@each_kernel
def test_no_keys(kernel, machine) -> None:
    check(machine, kernel, make_case(64, BFLOAT16, 5, 0, heads=2))


@each_kernel
def test_the_order_of_blocks_and_threads_does_not_matter(kernel) -> None:
    case = packed_case("mixed", "unknown", 64, heads=2)
    results = [run(Emulator(order=order, multiprocessors=132), kernel, case) for order in (0, 1, 2)]
    for result in results[1:]:
        assert all(torch.equal(result[key], results[0][key]) for key in result)


@on_both
@each_width
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
@pytest.mark.parametrize(
    "kernel", [k for k in KERNELS if k in ("attention_tangent", "attention_dual")]
)
def test_subsets_of_tangents(kernel, subset, head_dim, machine) -> None:
    check(machine, kernel, make_case(head_dim, BFLOAT16, 17, 40, subset=subset))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_kernel
def test_many_heads(kernel) -> None:
    check(Gpu(), kernel, make_case(64, BFLOAT16, 3, batch=700, heads=100))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_width
@each_kernel
def test_long_sequences(kernel, head_dim) -> None:
    results = [
        check(Gpu(), kernel, make_case(head_dim, BFLOAT16, n, batch=batch, heads=2))
        for n, batch in ((2048, 1), (256, 64))
    ]
    assert results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 80}, "head_dim must be 64, 72, 96 or 128 on a GPU, got 80"),
        (
            {"dtype": torch.float32},
            r"dtype must be 1 \(bfloat16\) or 2 \(float16\) on a GPU, got 0",
        ),
        ({"subset": (False, False, False)}, "at least one of t_q, t_k, t_v"),
    ],
)
def test_what_the_kernels_do_not_take(arguments, message) -> None:
    case = make_case(**({"head_dim": 64, "dtype": BFLOAT16, "n": 4} | arguments))
    with pytest.raises(ValueError, match=f"attention_tangent: {message}"):
        run(Emulator(), "attention_tangent", case)


#: Multiprocessors and shared memory per block of an A100, an H100 and a GeForce RTX 4090.
GPUS = {
    "A100": {"multiprocessors": 108, "shared_bytes": 163 * 1024},
    "H100": {"multiprocessors": 132, "shared_bytes": 227 * 1024},
    "4090": {"multiprocessors": 128, "shared_bytes": 99 * 1024},
}
each_gpu = pytest.mark.parametrize("gpu", GPUS)


@each_gpu
@each_width
@each_kernel
def test_every_size_can_be_launched(kernel, head_dim, gpu) -> None:
    """The emulator refuses grids and shared memory that a GPU would refuse."""
    for n in (1, 16, 17, 40, 64, 100, 256, 1000, 4096, 65536):
        for m in (1, n, 300):
            for batch in (1, 300):
                found = launches(kernel, head_dim, n, m, batch=batch, **GPUS[gpu])
                assert sum(launch.blocks for launch in found) >= 16 * batch * -(-n // 128)


@each_width
@each_kernel
def test_blocks_for_all_heads_and_samples(kernel, head_dim) -> None:
    """Far more than the 65535 that the second dimension of a grid has."""
    for launch in launches(kernel, head_dim, 300, batch=700, heads=100, **GPUS["H100"]):
        assert launch.blocks >= 70000 * 3
    for launch in launches(kernel, head_dim, 70000, heads=2, lengths=70000, **GPUS["H100"]):
        assert launch.blocks >= 2 * 70000
    with pytest.raises(RuntimeError, match=r"attention.*\(CUDA error 9\)"):
        launches(kernel, head_dim, 1 << 30, batch=4, heads=256, **GPUS["H100"])


@each_width
@each_kernel
def test_one_sample_is_spread_over_the_multiprocessors(kernel, head_dim) -> None:
    for launch in launches(kernel, head_dim, 256, **GPUS["H100"]):
        assert 128 <= launch.blocks <= 132 * 256 // launch.threads
    for launch in launches(kernel, head_dim, 64, **GPUS["H100"]):
        if kernel == "attention_backward":
            # A block has at least the rows of one warp: 16, or 32 where its threads are 128.
            assert launch.blocks == (64 if launch.threads == 256 else 32)
        else:
            assert launch.blocks == 64 * (3 if head_dim == 72 else 4)
    for heads in (12, 16):  # B/4 and XL/2
        for launch in launches(kernel, head_dim, 64, heads=heads, **GPUS["H100"]):
            assert launch.blocks >= 132 or kernel == "attention_backward"
    large = [launches(kernel, head_dim, n, batch=64, **GPUS["H100"]) for n in (256, 4096)]
    for launch in large[1]:
        assert launch.blocks == 64 * 16 * 4096 // 128
    for launch in large[0]:
        assert launch.blocks == 64 * 16 * 256 // 128


@pytest.mark.parametrize("subset", [(True, True, True), (True, False, False), (False, False, True)])
@each_width
@pytest.mark.parametrize("kernel", SPLIT)
def test_blocks_for_some_columns_give_the_same_bits(kernel, subset, head_dim) -> None:
    """Of packed sequences as well, whose last block of rows is not full."""
    offsets = ((0, 20, 21), (0, 65, 84))
    case = make_case(head_dim, BFLOAT16, 21, 84, heads=2, subset=subset, offsets=offsets)
    # Four blocks are no more than half of the multiprocessors, or they are.
    few, many = {"multiprocessors": 7}, {"multiprocessors": 132}
    names = [
        [launch.kernel for launch in launches(kernel, head_dim, 21, 84, heads=2, lengths=2, **gpu)]
        for gpu in (few, many)
    ]
    assert set(names[0]).isdisjoint(names[1])
    parts = check(Emulator(**many), kernel, case)
    whole = run(Emulator(**few), kernel, case)
    for name, value in whole.items():
        assert torch.equal(parts[name], value)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kernel", SPLIT)
def test_the_order_of_blocks_for_some_columns_does_not_matter(kernel, order) -> None:
    case = make_case(72, BFLOAT16, 64, 64, heads=2, layout=odd_strides)
    results = [
        run(Emulator(order=order, multiprocessors=132), kernel, case) for order in (0, order)
    ]
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())
