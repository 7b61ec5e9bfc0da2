"""What ptxas says of kernels, read and kept."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTPUT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4lean' for 'sm_90a'
ptxas info    : Function properties for _Z4lean
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
ptxas info    : Compile time = 58.392 ms
ptxas info    : Compiling entry function '_Z6greedy' for 'sm_90a'
ptxas info    : Function properties for _Z6greedy
    16 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
"""


@pytest.fixture
def compiler_report(monkeypatch):
    path = ROOT / "benchmarks" / "compiler_report.py"
    spec = importlib.util.spec_from_file_location("compiler_report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_is_read(compiler_report) -> None:
    lean, greedy = compiler_report.parse(OUTPUT)
    assert lean == {
        "kernel": "_Z4lean", "registers": 32, "stack": 0, "spill_stores": 0, "spill_loads": 0,
        "barriers": 0, "shared": 0,
    }  # fmt: skip
    assert (greedy["registers"], greedy["stack"], greedy["shared"]) == (255, 16, 1024)
    assert (greedy["spill_stores"], greedy["spill_loads"], greedy["barriers"]) == (24, 8, 1)


def run(compiler_report, monkeypatch, tmp_path, output: str) -> int:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "Cuda, release 13.0, V13.0.48"; exit; fi\n'
        f"cat <<'END'\n{output}END\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setattr(compiler_report.shutil, "which", lambda name: str(nvcc))
    monkeypatch.setattr(compiler_report, "readable", lambda names: names)
    command = ["", "--arch", "sm_80,sm_90a", "--json", str(tmp_path / "report.json"), "--jobs", "2"]
    command += ["a.cu", "b.cu"]
    monkeypatch.setattr(sys, "argv", command)
    return compiler_report.main()


def test_a_report_is_kept_and_a_spill_fails(compiler_report, monkeypatch, tmp_path) -> None:
    assert run(compiler_report, monkeypatch, tmp_path, OUTPUT) == 1
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["nvcc"] == "V13.0.48" and kept["sources"] == compiler_report.digest()
    assert kept["files"] == {name: {"sm_80": 2, "sm_90a": 2} for name in ("a.cu", "b.cu")}
    assert [(k["file"], k["arch"], k["kernel"]) for k in kept["kernels"]] == [
        (file, arch, kernel)
        for file in ("a.cu", "b.cu")
        for arch in ("sm_80", "sm_90a")
        for kernel in ("_Z4lean", "_Z6greedy")
    ]
    assert run(compiler_report, monkeypatch, tmp_path, OUTPUT[: OUTPUT.index("Compile time")]) == 0


def test_a_table_has_the_range_of_registers(compiler_report) -> None:
    kernels = [
        {"file": file, "arch": arch, "registers": registers}
        for file, arch, registers in (
            ("a.cu", "sm_80", 40), ("a.cu", "sm_80", 32), ("a.cu", "sm_90a", 50),
            ("a.cu", "sm_90a", 60), ("b.cu", "sm_90a", 70),
        )
    ]  # fmt: skip
    assert compiler_report.table(kernels).splitlines() == [
        "| file | kernels | registers, sm_80 | sm_90a |",
        "| --- | --- | --- | --- |",
        "| a.cu | 2 | 32 to 40 | 50 to 60 |",
        "| b.cu | 1 | none | 70 to 70 |",
    ]


def test_names_keep_all_arguments_of_their_templates(compiler_report) -> None:
    space = "tim::cuda::(anonymous namespace)::"
    subset = f"({space}Subset)"
    for number in (3, 7):
        full = f"void {space}tangent<tim::math::Float16, 128, {subset}{number}>(int*, {space}Plan)"
        name = f"tangent<Float16, 128, (Subset){number}>"
        assert compiler_report.shortened(full) == name
    assert compiler_report.shortened("tim::cuda::copy(float const*)") == "copy"
    assert compiler_report.shortened("_Z4lean") == "_Z4lean"


def test_a_digest_is_of_every_source_and_its_name(compiler_report, tmp_path) -> None:
    (tmp_path / "cuda").mkdir()
    (tmp_path / "math").mkdir()
    seen = {compiler_report.digest(tmp_path)}
    for name in ("cuda/a.cu", "cuda/b.cuh", "math/c.h", "kernels.h"):
        for content in ("1", "2"):
            (tmp_path / name).write_text(content)
            seen.add(compiler_report.digest(tmp_path))
    (tmp_path / "cuda/a.cu").rename(tmp_path / "cuda/z.cu")
    seen.add(compiler_report.digest(tmp_path))
    assert len(seen) == 10
    (tmp_path / "cuda/notes.txt").write_text("no source")
    assert compiler_report.digest(tmp_path) in seen


#: Kernels that spill, and where: not on the architectures that are compiled for (pyproject.toml).
SPILLING = {
    (name.format(dtype), "sm_100")
    for name in ("key_gradients<{}, 128>", "tangent<{}, 72, (Subset)1, 1>")
    for dtype in ("Float16", "BFloat16")
}


def test_the_report_that_is_committed_is_of_these_sources_and_tells_what_spills(
    compiler_report,
) -> None:
    """After a change of a kernel: `python benchmarks/compiler_report.py --arch ... --json ...`."""
    path = max((ROOT / "benchmarks" / "results").glob("compiler-*.json"))
    kept = json.loads(path.read_text())
    assert kept["sources"] == compiler_report.digest(), f"{path.name} is of other sources"
    files = {source.name for source in compiler_report.SOURCES.glob("*.cu")}
    assert kept["files"].keys() == files
    kernels: dict[tuple[str, str], list[str]] = {}
    spilling = set()
    for kernel in kept["kernels"]:
        kernels.setdefault((kernel["file"], kernel["arch"]), []).append(kernel["kernel"])
        if kernel["spill_stores"] or kernel["spill_loads"]:
            spilling.add((kernel["kernel"], kernel["arch"]))
    assert spilling == SPILLING
    with_kernels = files - {"kernels.cu"}  # the table of the others'
    assert kernels.keys() == set(itertools.product(with_kernels, ("sm_80", "sm_90a", "sm_100")))
    for (file, arch), names in kernels.items():
        assert len(set(names)) == len(names) == kept["files"][file][arch]
