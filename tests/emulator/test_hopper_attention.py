"""The attention kernels for Hopper, on the emulator and, where there is one, on such a GPU."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    DTYPES,
    HEAD_DIMS,
    LAYOUTS,
    SUBSETS,
    Emulator,
    Gpu,
    check,
    launches,
    make_case,
    run,
)

from tim.ops._attention_hopper import DUAL_WIDTHS

FORWARD, TANGENT = "attention_hopper", "attention_tangent_hopper"
DUAL = "attention_dual_hopper"
NAMES = {FORWARD: "forward_hopper", TANGENT: "tangent_hopper", DUAL: "dual_hopper"}
BFLOAT16 = torch.bfloat16
#: Multiprocessors do not matter: a block always has 128 queries.
H100 = {"capability": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024}
LENGTHS = [(1, 1), (17, 64), (64, 65), (65, 1), (130, 17), (128, 300)]

has_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_both = pytest.mark.parametrize(
    "machine",
    [
        pytest.param(Emulator(**H100), id="emulator"),
        pytest.param(
            Gpu(),
            id="gpu",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not has_hopper, reason="no GPU of compute capability 9.0"),
            ],
        ),
    ],
)
each_width = pytest.mark.parametrize("head_dim", HEAD_DIMS)
each_kernel = pytest.mark.parametrize("kernel", [FORWARD, TANGENT, DUAL])


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
def test_samples_heads_and_all_stages(kernel, head_dim, machine) -> None:
    """More tiles than stages, so that each of these is filled again."""
    check(machine, kernel, make_case(head_dim, BFLOAT16, 70, 600, batch=2, heads=2))


@on_both
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
@each_width
@pytest.mark.parametrize("kernel", [TANGENT, DUAL])
def test_subsets_of_tangents(kernel, head_dim, subset, machine) -> None:
    check(machine, kernel, make_case(head_dim, BFLOAT16, 17, 100, subset=subset))


@on_both
@pytest.mark.parametrize("layout", LAYOUTS)
@each_kernel
def test_layouts(kernel, layout, machine) -> None:
    case = make_case(72, BFLOAT16, 21, 70, batch=2, heads=2, layout=LAYOUTS[layout])
    check(machine, kernel, case)


@on_both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kernel
def test_large_scores(kernel, dtype, machine) -> None:
    results = check(machine, kernel, make_case(64, dtype, 40, 150, size=100.0))
    assert all(bool(x.isfinite().all()) for x in results.values())


@on_both
@each_kernel
def test_scores_of_keys_that_are_not_there_do_not_matter(kernel, machine) -> None:
    """All scores far below zero, the score of the zeros behind the last key."""
    case = make_case(72, BFLOAT16, 16, 65, size=0.0)
    case.q += 100.0
    case.k -= 10.0
    results = check(machine, kernel, case)
    assert all(bool(x.isfinite().all()) for x in results.values())


@on_both
@each_kernel
def test_columns_behind_the_head_do_not_matter(kernel, machine) -> None:
    """Of the next head, or what follows the tensor: D = 72 multiplies 80 columns of q and k."""
    case = make_case(72, BFLOAT16, 5, 70, heads=2)
    for x in case.inputs[1:] + case.tangents[1:]:
        x[:, :, 1] = torch.inf
    results = run(machine, kernel, case)
    alone = make_case(72, BFLOAT16, 5, 70, heads=2)
    expected = run(machine, kernel, alone)
    for name, value in results.items():
        head = (slice(None), slice(None), 0) if value.dim() == 4 else (slice(None), 0)
        assert bool(value[head].isfinite().all())
        assert torch.equal(value[head], expected[name][head])


@each_kernel
def test_the_order_of_threads_does_not_matter(kernel) -> None:
    case = make_case(72 if kernel == DUAL else 96, BFLOAT16, 130, 400)
    results = [run(Emulator(**H100, order=order), kernel, case) for order in (0, 1, 2, 3)]
    for result in results[1:]:
        assert all(torch.equal(result[key], results[0][key]) for key in result)


@pytest.mark.parametrize(
    ("options", "properties"),
    [
        ({"lengths": 3}, H100),
        ({"m": 0}, H100),
        ({}, H100 | {"capability": 80}),
        ({}, H100 | {"capability": 100}),
        ({}, H100 | {"shared_bytes": None}),
    ],
    ids=["packed", "no keys", "8.0", "10.0", "little memory"],
)
@each_width
@each_kernel
def test_others_run_the_kernel_for_all_gpus(kernel, head_dim, options, properties) -> None:
    if properties["shared_bytes"] is None:  # less than two stages take
        properties = properties | {"shared_bytes": (33 if kernel == FORWARD else 60) * 1024}
    if kernel != DUAL or head_dim in DUAL_WIDTHS:
        (here,) = launches(kernel, head_dim, 256, **H100)
        assert here.kernel.split("<")[0] == NAMES[kernel]
        assert here.blocks == 16 * 2
    else:
        options, properties = {}, H100
    there = launches(kernel, head_dim, 256, **options, **properties)
    expected = launches(kernel.removesuffix("_hopper"), head_dim, 256, **options, **properties)
    assert there == expected


@each_width
@each_kernel
def test_every_size_can_be_launched(kernel, head_dim) -> None:
    for n in (1, 64, 129, 4096, 65536):
        for batch in (1, 700):
            found = launches(kernel, head_dim, n, batch=batch, heads=100, **H100)
            if kernel != DUAL or head_dim in DUAL_WIDTHS:
                assert [launch.blocks for launch in found] == [100 * batch * -(-n // 128)]
    # More than a grid has, which the other kernels refuse.
    with pytest.raises(RuntimeError, match=r"attention.*\(CUDA error 9\)"):
        launches(kernel, head_dim, 1 << 30, batch=4, heads=256, **H100)
