"""`tim info`: what is installed, which devices there are, and which operations run on kernels."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tim.config import RunConfig

PACKAGES = ("torch", "numpy", "safetensors", "huggingface-hub", "tyro", "tensorboard", "diffusers")


@dataclass(frozen=True)
class Info:
    """Versions, the compiled extension, devices and threads."""

    ops: bool = False
    """Only the table of operations: what runs on a compiled kernel, in which directions, for which
    dtypes and sizes, and why the rest does not."""
    preset: str | None = None
    """Only the memory that training this preset needs on each rank, by estimate."""
    batch: int | None = None
    """Images of a step, over all ranks; by default the preset's (with --preset)."""
    ranks: int = 1
    """Processes that train together (with --preset)."""


def main(arguments: list[str]) -> int:
    from rich.console import Console

    from tim import memory
    from tim.cli import parse

    command = parse(Info, "tim info", arguments)
    # A file has no width: wrapping the columns to 80 there would only make them hard to read.
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 180)
    if command.preset is not None:
        config = _preset(command)
        headings, *rows = memory.table(config, command.ranks)
        console.print(
            f"{command.preset}, {config.train.batch_size} images a step on {command.ranks} "
            f"rank{'s' * (command.ranks > 1)}, {config.train.precision}: GB on each rank"
        )
        console.print(_table(headings, rows))
        console.print(
            "* activations recomputed (--train.gradient-checkpointing)\n"
            "Not counted: CUDA context, buffers of cuBLAS and NCCL, what the allocator cannot use, "
            "encoders of captions and features."
        )
        return 0
    if command.ops:
        headings = ("operation", "on", "directions", "kernel for", "PyTorch for")
        console.print(_table(headings, table()))
        console.print()
        console.print(_table(("", ""), evidence()))
    else:
        console.print(_table(("", ""), facts()))
        console.print()
        console.print(_table(("operation", "cpu", "cuda"), operations()))
        console.print("\n`tim info --ops` tells directions, dtypes and sizes, and why.")
    return 0


def _preset(command: Info) -> RunConfig:
    from tim import presets

    config = presets.get(command.preset)
    if command.batch is None:
        return config
    if command.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {command.batch}")
    train = dataclasses.replace(config.train, batch_size=command.batch)
    return dataclasses.replace(config, train=train)


def facts() -> list[tuple[str, str]]:
    """(what, value) of everything but the operations."""
    import torch

    import tim
    from tim import _extension

    build = _extension.build_info()
    if _extension.C is None:
        reason = build.get("reason") or _extension.REASON
        # A compiler on record and no complaint of the build: it is there, and does not load.
        built = bool(build.get("compiler")) and not build.get("reason")
        remedy = build.get("remedy") or (
            "install the package from its source folder with a C++ compiler there: pip install ."
        )
        if built:
            remedy = "put right what the message names, or install the package again"
        state = "built, but not loaded" if built else "not built"
        extension = [("extension", f"{state}: {reason}"), ("to get it", str(remedy))]
    else:
        cuda = build.get("cuda")
        kernels = f"CUDA {cuda}, {build['cuda_architectures']}" if cuda else "not built"
        extension = [
            ("extension", f"built by {build['compiler']}, flags {' '.join(build['flags'])}"),
            ("cpu kernels", f"{_extension.C.cpu.isa()} in use, of {', '.join(build['isa'])}"),
            ("cuda kernels", kernels),
        ]
        if build.get("remedy"):
            extension.append(("to get more", f"{build['reason']}: {build['remedy']}"))
    devices = [
        (f"cuda:{i}", f"{p.name}, {p.total_memory / 1e9:.0f} GB, compute {p.major}.{p.minor}")
        for i in range(torch.cuda.device_count())
        for p in [torch.cuda.get_device_properties(i)]
    ]
    return [
        ("tim", tim.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, _version(name)) for name in PACKAGES),
        *extension,
        ("TIM_KERNELS", tim.ops.in_force()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        *(devices or [("cuda", "no device that torch can see")]),
    ]


def operations() -> list[tuple[str, str, str]]:
    """(operation, what runs on a cpu, what runs on a CUDA device) for each operation, in short."""
    from tim import ops

    kernels: dict[str, dict[str, bool]] = {}
    for entry in ops.overview():
        found = kernels.setdefault(entry.operation, dict.fromkeys(ops.DEVICES, False))
        found[entry.device] |= bool(entry.kernel)
    return [
        (name, *("kernel" if found[device] else "PyTorch" for device in ops.DEVICES))
        for name, found in kernels.items()
    ]


def table() -> list[tuple[str, ...]]:
    """(operation, device, directions, dtypes on a kernel, what is not and why)."""
    from tim import ops

    return [
        (e.operation, e.device, ", ".join(e.directions), ", ".join(e.kernel) or "-", e.otherwise)
        for e in ops.overview()
    ]


def evidence() -> list[tuple[str, str]]:
    """What the table rests on, and what overrides it."""
    from tim import ops

    measured = [
        (f"{device} choices", f"rest on {source}" if source else "not yet measured")
        for device, source in ops.MEASURED.items()
    ]
    return [*measured, ("TIM_KERNELS", ops.in_force())]


def _version(package: str) -> str:
    if package == "torch":  # which CUDA it is for stands only there
        import torch

        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _table(headings: tuple[str, ...], rows: list):
    from rich.table import Table

    table = Table(*headings, box=None, show_header=any(headings), pad_edge=False)
    for name, *values in rows:
        table.add_row(f"[bold]{name}", *values)
    return table
