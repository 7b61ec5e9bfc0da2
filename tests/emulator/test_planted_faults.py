"""What the emulator finds: small kernels with a planted fault each, and the same without it."""

import re

import pytest
import torch
from emulated import SANITIZE, module

THREADS = 64
#: Kernel, blocks, what it computes.
HEALTHY = {
    "pass_on": (1, lambda x: x.roll(1)),
    "swap": (1, lambda x: x.view(-1, 2, 16).flip(1).flatten() + 1),
    "group_sum": (1, lambda x: x.view(-1, 16).sum(1).repeat_interleave(16)),
    "reverse": (3, lambda x: x.flip(0)),
    "meet": (1, lambda x: x),
    "broadcast": (1, lambda x: x[9].expand_as(x)),
    "copy": (
        1,
        lambda x: x[tiles()] + torch.where(torch.arange(THREADS) % 4 < 2, x, torch.zeros(())),
    ),
}
#: What the message says after the kernel's name: block, thread, fault, line.
FAULTS = {
    "pass_on_no_barrier": r"thread \(0, 0, 0\) reads 4 bytes of shared memory at \w+: the block "
    r"has not written there, at tests/emulator/faults.cu:\d+",
    "pass_on_unwritten": r"thread \(6, 0, 0\) reads 4 bytes .*: the block has not written there",
    "pass_on_out_of_bounds": r"thread \(62, 0, 0\) writes 4 bytes of shared memory at \w+: out of "
    r"bounds, at offset 256 of the block's 256 bytes",
    "pass_on_warp_barrier": r"thread \(0, 0, 0\) reads 4 bytes .*: a race with thread "
    r"\(63, 0, 0\), as no barrier lies between",
    "pass_on_overwrite": r"thread \(0, 0, 0\) writes 4 bytes .*: a race with thread \(1, 0, 0\)|"
    r"thread \(1, 0, 0\) reads 4 bytes .*: a race with thread \(0, 0, 0\)",
    "swap_no_warp_barrier": "the block has not written there",
    "swap_half_warp_barrier": r"a race with thread \(\d+, 0, 0\)|has not written there",
    "swap_overwrite": r"thread \(\d+, 0, 0\) (reads|writes) 4 bytes .*: a race with thread",
    "group_sum_no_power": "width must be a power of two up to 32, got 24",
    "group_sum_lanes_differ": "__shfl_down_sync of width 16 where lane 0 has width 8",
    "group_sum_lane_missing": "__shfl_down_sync with lane 7 in its mask, which has ended",
    "group_sum_outside_mask": "lane 7 reads lane 8, which does not take part in it",
    "group_sum_other_mask": "a mask that lacks the lane that calls it|which has another mask",
    "reverse_beyond_end": r"block \(0, 0, 0\), thread \(0, 0, 0\) reads 4 bytes of global memory "
    r"at \w+: out of bounds, 4 bytes beyond the end of an array",
    "reverse_before_start": r"block \(2, 0, 0\), thread \(63, 0, 0\) reads 4 bytes .*: out of "
    "bounds, 4 bytes before the start of an array",
    "reverse_misaligned": r"thread \(3, 0, 0\) accesses memory at an address that is no multiple "
    "of 8",
    "reverse_race": r"block \(1, 0, 0\), thread \(0, 0, 0\) writes 4 bytes .*: a race with block "
    r"\(0, 0, 0\) of the same launch",
    "reverse_in_place": r"block \(2, 0, 0\), thread \(0, 0, 0\) reads 4 bytes .*: a race with "
    r"block \(0, 0, 0\) of the same launch",
    "reverse_read_only": "this launch has written there, which the read-only path may not see",
    "meet_early_exit": r"thread \(0, 0, 0\) waits at a barrier .* for ever: thread \(40, 0, 0\) "
    "has ended",
    "meet_branch": r"thread \(32, 0, 0\) waits at a barrier \(.*\) other than that of thread "
    r"\(0, 0, 0\) \(.*\)",
    "meet_one_more": r"thread \(63, 0, 0\) waits at a barrier .* for ever: thread \(0, 0, 0\) has "
    "ended",
    "broadcast_no_barrier": "the block has not written there",
    "broadcast_out_of_bounds": "out of bounds, at offset 4 of an array of 4 bytes",
    "copy_no_wait": r"the cp.async of thread \(1, 0, 0\) to there has not been waited for",
    "copy_no_barrier": "the block has not written there",
    "copy_not_committed": "to there has not been waited for",
    "copy_misaligned": "cp.async with an address that is no multiple of 16",
    "copy_overwrite": r"a race with thread \(0, 0, 0\)",
    "copy_ends": "ends before a cp.async of its own that it has not awaited",
    "overflow": "overflows its stack of 128 KiB",
    "divide": "divides an integer by zero",
}
REFUSALS = {
    "too_many_threads": r"a block of \(1056, 1, 1\) threads cannot be launched",
    "no_blocks": r"a grid of \(0, 1, 1\) blocks cannot be launched",
    "too_much_shared_memory": "49156 bytes of dynamic shared memory, where the kernel has a limit "
    r"of 49152 \(cudaFuncSetAttribute raises it\)",
}


def tiles() -> torch.Tensor:
    """Where thread i finds its value in the tile that its neighbour has copied."""
    i = torch.arange(THREADS)
    return (i ^ 1) // 4 * 4 + i % 4


@pytest.fixture(params=[0, 1, 2], ids="order{}".format)
def kernels(request):
    kernels = module("tim_test_kernels")
    kernels.set_device(order=request.param)
    yield kernels
    kernels.set_device()
    kernels.set_memory([])


def run(kernels, name: str, blocks: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(1.0, blocks * THREADS + 1)
    out = torch.full_like(x, torch.nan)
    kernels.set_memory([(t.data_ptr(), t.nbytes) for t in (x, out)])
    getattr(kernels, name)(x.data_ptr(), out.data_ptr())
    return x, out


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_kernel_runs_in_any_order(kernels, name) -> None:
    blocks, expected = HEALTHY[name]
    x, out = run(kernels, name, blocks)
    assert torch.equal(out, expected(x))


def test_a_wrong_width_that_hardware_takes_shows_in_the_result(kernels) -> None:
    x, out = run(kernels, "group_sum_width", 1)
    assert not torch.equal(out, HEALTHY["group_sum"][1](x))


@pytest.mark.skipif(SANITIZE == "ON", reason="the sanitizers look for other faults")
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_in_any_order(kernels, name) -> None:
    with pytest.raises(RuntimeError, match=rf"{name}: \w+.*, block .*, thread ") as error:
        run(kernels, name)
    message = str(error.value)
    kernels.set_device()
    with pytest.raises(RuntimeError, match=FAULTS[name]):
        run(kernels, name)
    # After an error the device works on.
    x, out = run(kernels, "reverse")
    assert torch.equal(out, x.flip(0)), message


@pytest.mark.skipif(SANITIZE == "ON", reason="the sanitizers look for other faults")
def test_a_seed_chooses_an_order() -> None:
    kernels = module("tim_test_kernels")

    def first_race(seed: int) -> str:
        kernels.set_device(order=seed)
        with pytest.raises(RuntimeError, match=": a race with block") as error:
            run(kernels, "reverse_race")
        return re.sub(r"0x\w+", "", str(error.value))

    try:
        assert len({first_race(seed) for seed in range(1, 9)}) > 4
        assert first_race(5) == first_race(5)
    finally:
        kernels.set_device()
        kernels.set_memory([])


@pytest.mark.parametrize("name", REFUSALS)
def test_a_launch_that_no_gpu_takes_is_refused(kernels, name) -> None:
    with pytest.raises(RuntimeError, match=REFUSALS[name]):
        run(kernels, name)


def test_more_shared_memory_must_be_asked_for(kernels) -> None:
    try:
        kernels.limit_shared_memory(64 * 1024)
        x, out = run(kernels, "too_much_shared_memory", 1)
        assert torch.equal(out, x.roll(1))
        with pytest.raises(RuntimeError, match="a block has at most 166912 bytes of shared memory"):
            kernels.limit_shared_memory(200 * 1024)
    finally:
        kernels.limit_shared_memory(48 * 1024)
