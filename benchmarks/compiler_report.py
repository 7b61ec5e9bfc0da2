"""Registers and spills of every CUDA kernel, as ptxas reports them; fails when one spills.

python benchmarks/compiler_report.py [--arch sm_80,sm_90a,sm_100] [--jobs N] [--json FILE]
    [FILE.cu ...]

Without files: all of them, each for each architecture in a process of its own, `--jobs` at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = CSRC / "cuda"
#: What the kernels are made of; the headers of the emulator are for the host.
MADE_OF = ("cuda/*.cu", "cuda/*.cuh", "math/*.h", "kernels.h")
REPORT = re.compile(
    r"Function properties for (?P<name>\S+)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers, used (?P<barriers>\d+) barriers"
    r"(?:, (?P<shared>\d+) bytes smem)?"
)
NUMBERS = ("registers", "stack", "spill_stores", "spill_loads", "barriers", "shared")


def digest(csrc: Path = CSRC) -> str:
    """SHA-256 of all sources of kernels: a report is of these and of no others."""
    found = sorted(path for pattern in MADE_OF for path in csrc.glob(pattern))
    sha = hashlib.sha256()
    for path in found:
        content = path.read_bytes()
        sha.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return sha.hexdigest()


def parse(output: str) -> list[dict]:
    """One entry for each kernel that ptxas tells of; bytes, but for registers and barriers."""
    found = (match.groupdict() for match in REPORT.finditer(output))
    return [
        {"kernel": kernel["name"], **{name: int(kernel[name] or 0) for name in NUMBERS}}
        for kernel in found
    ]


def report(nvcc: str, source: Path, arch: str) -> list[dict]:
    """The kernels of one file."""
    command = [nvcc, "-std=c++17", "-O3", "--resource-usage", f"-arch={arch}", "-c", str(source)]
    # As in cmake/cuda.cmake: kernels that only this architecture can run.
    defines = ["-DTIM_SM90A"] if arch == "sm_90a" else []
    command += [*defines, "-o", "/dev/null"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    kernels = parse(result.stdout + result.stderr)
    names = readable([kernel["kernel"] for kernel in kernels])
    return [
        kernel | {"file": source.name, "arch": arch, "kernel": name}
        for kernel, name in zip(kernels, names, strict=True)
    ]


def timed(nvcc: str, source: Path, arch: str) -> tuple[list[dict], float]:
    start = time.perf_counter()
    return report(nvcc, source, arch), time.perf_counter() - start


def readable(names: list[str]) -> list[str]:
    """C++ names as `shortened` has them; as they are without c++filt."""
    if not names or shutil.which("c++filt") is None:
        return names
    result = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    return [shortened(line) for line in result.stdout.splitlines()]


def shortened(name: str) -> str:
    """A C++ name without namespaces and parameters, with all of its template's arguments."""
    name = re.sub(r"tim::|cuda::|math::|\(anonymous namespace\)::|^void ", "", name)
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:i]
    return name


def version_of(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release \S+ (V\S+)", output).group(1)


def write(path: Path, results: dict) -> None:
    """One kernel a line, so that reports can be compared."""
    kernels = ",\n".join(json.dumps(kernel) for kernel in results["kernels"])
    facts = json.dumps({key: value for key, value in results.items() if key != "kernels"})
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(f'{facts[:-1]}, "kernels": [\n{kernels}\n]}}\n')
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def table(kernels: list[dict]) -> str:
    """Markdown: the files, how many kernels they have, and their registers by architecture."""
    archs = list(dict.fromkeys(kernel["arch"] for kernel in kernels))
    lines = [
        f"| file | kernels | registers, {' | '.join(archs)} |",
        "| --- " * (2 + len(archs)) + "|",
    ]
    for file in dict.fromkeys(kernel["file"] for kernel in kernels):
        cells = []
        for arch in archs:
            found = [k["registers"] for k in kernels if (k["file"], k["arch"]) == (file, arch)]
            cells.append(f"{min(found)} to {max(found)}" if found else "none")
        lines.append(f"| {file} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90a", help="several with commas between them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the report here")
    parser.add_argument("files", nargs="*", type=Path, default=sorted(SOURCES.glob("*.cu")))
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        sys.exit("nvcc was not found; put it into PATH")
    sources = digest()
    kernels: list[dict] = []
    compiled: dict[str, dict[str, int]] = {}
    work = list(itertools.product(arguments.files, arguments.arch.split(",")))
    with ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
        for (source, arch), (found, seconds) in zip(
            work, pool.map(lambda task: timed(nvcc, *task), work), strict=True
        ):
            kernels += found
            compiled.setdefault(source.name, {})[arch] = len(found)
            print(f"{source.name} {arch}: {len(found)} kernels in {seconds:.0f} s", flush=True)
            for kernel in found:
                print(
                    f"{kernel['registers']:8} registers {kernel['spill_stores']:5} bytes spilled  "
                    f"{kernel['kernel']}"
                )
    if digest() != sources:
        sys.exit("the sources changed meanwhile; once more")
    spilled = sum(kernel["spill_stores"] + kernel["spill_loads"] > 0 for kernel in kernels)
    most = max((kernel["registers"] for kernel in kernels), default=0)
    print(table(kernels))
    print(f"{len(kernels)} kernels, {spilled} with spills, at most {most} registers")
    if arguments.json:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        facts = {"nvcc": version_of(nvcc), "date": date, "sources": sources, "files": compiled}
        write(arguments.json, facts | {"kernels": kernels})
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
