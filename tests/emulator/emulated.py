"""Builds the emulator and runs operations on it: CUDA kernels, compiled for the CPU."""

from __future__ import annotations

import fcntl
import functools
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from tim import _extension
from tim.ops import _dispatch as dispatch

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "emulator"


@functools.cache
def build() -> None:
    """Build the modules, or bring them up to date; skip the test where there is no compiler."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    BUILD.mkdir(parents=True, exist_ok=True)
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    configure = [
        cmake, "-S", str(Path(__file__).parent), "-B", str(BUILD), "-G", "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist wait for the first
        for command in (configure, [cmake, "--build", str(BUILD)]):
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr
    sys.path.insert(0, str(BUILD))


def module(name: str = "tim_emulator") -> ModuleType:
    build()
    return importlib.import_module(name)


@contextmanager
def emulated() -> Iterator[ModuleType]:
    """Inside, tim.ops runs the emulated CUDA kernels on tensors of the CPU."""
    emulator = module()

    def forget() -> None:
        dispatch.has_kernel.cache_clear()
        dispatch._kernel.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_extension, "kernels", lambda device: emulator if device == "cpu" else None)
        patch.setitem(dispatch.KERNEL_DTYPES, "cpu", dispatch.KERNEL_DTYPES["cuda"])
        forget()
        try:
            yield emulator
        finally:
            emulator.set_device()
            forget()
    forget()
