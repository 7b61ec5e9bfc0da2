"""Builds the emulator and runs operations on it: CUDA kernels, compiled for the CPU."""

from __future__ import annotations

import fcntl
import functools
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tim import _extension
from tim.ops import _dispatch as dispatch
from tim.ops import _table

ROOT = Path(__file__).parents[2]
#: Build and run under AddressSanitizer and UBSan, whose runtime must be loaded first (.ci/run).
SANITIZE = os.environ.get("TIM_EMULATOR_SANITIZE", "OFF")
#: Names of the kernels that operations have called on the emulator.
launched: list[str] = []
BUILD = ROOT / "build" / ("emulator" if SANITIZE == "OFF" else "emulator-sanitized")


@functools.cache
def build() -> None:
    """Build the modules, or bring them up to date; skip the test where that is impossible."""
    if sys.platform != "linux":
        pytest.skip("the emulator needs Linux")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    BUILD.mkdir(parents=True, exist_ok=True)
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    configure = [
        cmake, "-S", str(Path(__file__).parent), "-B", str(BUILD), "-G", "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DTIM_EMULATOR_SANITIZE={SANITIZE}",
    ]  # fmt: skip
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist wait for the first
        for command in (configure, [cmake, "--build", str(BUILD)]):
            # The compiler has no need of a sanitizer that is loaded into this process.
            environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
            result = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert result.returncode == 0, result.stdout + result.stderr
    sys.path.insert(0, str(BUILD))


def module(name: str = "tim_emulator") -> ModuleType:
    build()
    return importlib.import_module(name)


def extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element, which may lie apart."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


@contextmanager
def emulated(place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Iterator[ModuleType]:
    """Inside, tim.ops runs the emulated CUDA kernels on tensors of the CPU.

    A kernel may touch only the tensors whose addresses were taken since the last launch. New
    tensors hold NaNs, which show where a kernel has not written, and lie where `place` puts them.
    """
    emulator = module()

    touched: dict[int, int] = {}
    data_ptr, launch = torch.Tensor.data_ptr, dispatch.launch

    def recorded(tensor: Tensor) -> int:
        address = data_ptr(tensor)
        touched[address] = max(touched.get(address, 0), extent(tensor))
        return address

    def launch_within(name: str, anchor: Tensor, *arguments: object) -> None:
        for argument in arguments:
            if isinstance(argument, Tensor):
                argument.data_ptr()
        emulator.set_memory(list(touched.items()))
        launch(name, anchor, *arguments)
        touched.clear()
        launched.append(name)

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*arguments: object, **keywords: object) -> Tensor:
            tensor = make(*arguments, **keywords)
            return place(tensor.fill_(torch.nan)) if tensor.is_floating_point() else tensor

        return allocate

    def forget() -> None:
        _table.recall.cache_clear()
        dispatch._kernel.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_extension, "kernels", lambda device: emulator if device == "cpu" else None)
        patch.setattr(torch.Tensor, "data_ptr", recorded, raising=False)
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(dispatch, "launch", launch_within)
        patch.setitem(dispatch.KERNEL_DTYPES, "cpu", dispatch.KERNEL_DTYPES["cuda"])
        limits = [replace(rule, device="cpu") for rule in _table.LIMITS if rule.device == "cuda"]
        patch.setattr(_table, "LIMITS", tuple(limits))
        patch.setattr(dispatch, "WITH_SCRATCH", {"cpu"})
        forget()
        try:
            yield emulator
        finally:
            emulator.set_device()
            emulator.set_memory([])
            forget()
    forget()
