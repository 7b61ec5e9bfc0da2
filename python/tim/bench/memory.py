"""Peak memory of one call, counted by PyTorch's own allocators."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that `call` holds at a time, its result included, beyond those in use before it.

    On a CUDA device the caching allocator keeps that maximum. On a CPU it is the largest running
    sum of the allocations and releases of PyTorch's CPU allocator, as the profiler records them:
    exact and the same in every run, where the resident set of the process also counts code, the
    pools of malloc and libraries' work space, and does not shrink again. What kernels allocate
    beside that allocator is not in it (ours: a few rows for each thread).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    return peak_of([size for _, size in sorted(_cpu_allocations(call), key=lambda event: event[0])])


def peak_of(sizes: list[int]) -> int:
    """Largest running sum of allocations (positive) and releases (negative)."""
    total = peak = 0
    for size in sizes:
        total += size
        peak = max(peak, total)
    return peak


def _cpu_allocations(call: Callable[[], object]) -> list[tuple[float, int]]:
    """(time, bytes) of every allocation and release during the call."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports its starts and stops
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
