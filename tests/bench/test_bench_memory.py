import subprocess
import sys

import pytest
import torch

from tim.bench.memory import peak_bytes, peak_of

CPU = torch.device("cpu")


def test_peak_of_a_series_of_allocations() -> None:
    assert peak_of([]) == 0
    assert peak_of([100, -100, 60, 50, -60]) == 110


def test_peak_bytes_counts_what_lives_at_the_same_time() -> None:
    x = torch.randn(1000, 1000)  # 4 MB, there before and so not counted

    def chain() -> torch.Tensor:
        y = x * 2
        y = y + 1  # both operands live here: two tensors
        y = y * 3  # the first is gone again
        return y

    slack = 4096  # scalars
    assert abs(peak_bytes(chain, CPU) - 2 * 4_000_000) < slack
    assert peak_bytes(lambda: x.add_(1), CPU) < slack


def test_peak_bytes_of_a_backward_pass() -> None:
    weight = torch.randn(500, 500, requires_grad=True)

    def step() -> None:
        (gradient,) = torch.autograd.grad((weight * 2).square().sum(), weight)
        del gradient

    peak = peak_bytes(step, CPU)
    assert 2_000_000 <= peak <= 5_000_000
    assert peak == peak_bytes(step, CPU)


FREED_AND_TAKEN_AGAIN = """
import resource, torch
from tim.bench import machine
kept = machine.keep_freed_memory()
def call():
    return [torch.empty(400_000).fill_(1.0) for _ in range(4)]
for _ in range(5):
    call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    call()
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept() -> None:
    """1600 pages of results come without the page faults that fetching them again would cost."""
    command = [sys.executable, "-c", FREED_AND_TAKEN_AGAIN]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if told[0] == "False":
        pytest.skip("another C library")
    assert float(told[1]) < 100
