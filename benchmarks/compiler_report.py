"""Registers and spills of every CUDA kernel, as ptxas reports them; fails when one spills.

python benchmarks/compiler_report.py [--arch sm_90a] [FILE.cu ...]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
REPORT = re.compile(
    r"Function properties for (\S+)\n.*? (\d+) bytes spill stores.*?\n.*?Used (\d+) registers"
)


def report(nvcc: str, source: Path, arch: str) -> list[tuple[str, int, int]]:
    """(kernel, registers, bytes of spill stores) of one file."""
    command = [nvcc, "-std=c++17", "-O3", "--resource-usage", f"-arch={arch}", "-c", str(source)]
    result = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    found = REPORT.findall(result.stdout + result.stderr)
    return [(name, int(registers), int(spills)) for name, spills, registers in found]


def readable(names: list[str]) -> list[str]:
    """C++ names without namespaces and parameters; as they are without c++filt."""
    if shutil.which("c++filt") is None:
        return names
    result = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    short = re.compile(r"tim::|cuda::|math::|\(anonymous namespace\)::|^void ")
    return [short.sub("", line).split("(", 1)[0] for line in result.stdout.splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("files", nargs="*", type=Path, default=sorted(SOURCES.glob("*.cu")))
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        sys.exit("nvcc was not found; put it into PATH")
    spilled = False
    for source in arguments.files:
        kernels = report(nvcc, source, arguments.arch)
        for name, (_, registers, spills) in zip(
            readable([kernel[0] for kernel in kernels]), kernels, strict=True
        ):
            print(f"{source.name:28} {registers:4} registers {spills:5} bytes spilled  {name}")
            spilled = spilled or spills > 0
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
