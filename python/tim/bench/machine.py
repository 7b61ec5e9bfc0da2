"""The machine under test: what it is, how fast it copies and multiplies, which caches it has."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from tim import ops
from tim.bench.timing import compare

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
_GPU_STATE = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")


def describe(device: torch.device) -> dict[str, object]:
    """Hardware, software and threads, as they stand in every result file."""
    facts: dict[str, object] = {
        "device": device.type,
        "name": _cpu_name(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": caches(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": {name: list(backends) for name, backends in ops.available().items()},
        "TIM_KERNELS": os.environ.get("TIM_KERNELS", "auto"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "gpu_state": gpu_state(),
        }
    return facts


def keep_freed_memory() -> bool:
    """Let malloc keep what tensors give back, up to 32 MiB each.

    glibc returns the end of its heap to the system, and whether a result lies there depends on the
    calls before. Fetching it again costs a page fault for each 4 KiB, which would be most of the
    time of some calls, whoever makes them.

    False where the C library knows no such thing.
    """
    try:
        tune = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(tune(trim_threshold, 1 << 30) and tune(mmap_threshold, 1 << 25))


def limits(
    device: torch.device, dtypes: Sequence[torch.dtype], seconds: float
) -> dict[str, float | dict[str, float]]:
    """What the machine attains: bytes/s of a large copy (read + written), FLOP/s of a product."""
    size = _COPY_BYTES[device.type]
    source = torch.randint(0, 256, (size // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = _MATMUL_SIZE[device.type]
    functions = {"copy": [lambda: target.copy_(source)]}
    for dtype in dtypes:
        a = torch.randn(n, n, device=device).to(dtype)
        functions[name_of(dtype)] = [lambda a=a: a @ a]
    with torch.no_grad():
        times = compare(functions, device, seconds)
    copy = times.pop("copy")
    return {
        "copy_bytes_per_second": size / copy.median,
        "matmul_flops_per_second": {name: 2 * n**3 / t.median for name, t in times.items()},
    }


def caches(device: torch.device) -> dict[str, int]:
    """Bytes of each data cache that outlives a call, smallest first: those the used cores share in.

    A CPU's private caches count once for each thread.
    """
    if device.type == "cuda":
        return {"L2": torch.cuda.get_device_properties(device).L2_cache_size}
    found = {}
    for folder in sorted(_CACHES.glob("index*")):
        level, kind, size, sharing = (
            (folder / name).read_text().strip()
            for name in ("level", "type", "size", "shared_cpu_list")
        )
        if kind == "Instruction" or level == "1":
            continue
        private = sharing == "0"
        found[f"L{level}"] = _bytes(size) * (torch.get_num_threads() if private else 1)
    return found


def residence(size: int, device: torch.device) -> str:
    """Smallest cache that `size` bytes fit in, or "memory"."""
    return next((name for name, room in caches(device).items() if size <= room), "memory")


def why_no_compile(device: torch.device) -> str | None:
    """Why torch.compile cannot make code for `device` here; None when it should."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"torch.compile needs Triton: {error}"
        return None
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler: no {compiler}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gpu_state() -> dict[str, str]:
    """Clocks, power and temperature at this moment; empty where nvidia-smi does not tell."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    query = f"--query-gpu={','.join(_GPU_STATE)}"
    command = ["nvidia-smi", f"--id=GPU-{gpu}", query, "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = (value.strip() for value in answer.stdout.split(","))
    return dict(zip(_GPU_STATE, values, strict=False))


def _bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
