"""What gets installed: sdist and wheel, their metadata, builds with and without a compiler."""

from __future__ import annotations

import configparser
import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for tool in ("build", "scikit_build_core", "pybind11"):
    pytest.importorskip(tool, reason="packages are built with the tools of the dev extra")


def build(kind: str, source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    """`python -m build` with the tools of this environment instead of freshly downloaded ones."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out)]
    options = [] if kind == "sdist" else [f"--config-setting=build-dir={out / 'objects'}"]
    return subprocess.run(
        [*command, *options, str(source)],
        env={**os.environ, "TIM_CUDA": "OFF", **environment},
        capture_output=True,
        text=True,
    )


def need_compiler() -> None:
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip("no C++ compiler")


def only(paths) -> Path:
    (path,) = paths
    return path


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def read(wheel: Path, end: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(only(n for n in archive.namelist() if n.endswith(end))).decode()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The unpacked sdist; everything below is built from it."""
    out = tmp_path_factory.mktemp("sdist")
    result = build("sdist", ROOT, out)
    assert result.returncode == 0, result.stdout + result.stderr
    with tarfile.open(only(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out / "unpacked", filter="data")
    return only((out / "unpacked").iterdir())


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    need_compiler()
    out = tmp_path_factory.mktemp("wheel")
    result = build("wheel", source, out)
    assert result.returncode == 0, result.stdout + result.stderr
    return only(out.glob("*.whl"))


@pytest.fixture(scope="module")
def pure_wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pure")
    result = build("wheel", source, out, CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stdout + result.stderr
    return only(out.glob("*.whl"))


def modules() -> set[str]:
    return {str(path.relative_to(ROOT / "python")) for path in (ROOT / "python").rglob("*.py")}


def package_files(wheel: Path) -> set[str]:
    return {name for name in names(wheel) if ".dist-info/" not in name}


def test_sdist_holds_the_sources_and_nothing_built(source):
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[chu]*")}
    needed = {"pyproject.toml", "CMakeLists.txt", "constraints.txt", "PKG-INFO"}
    assert needed | kernels | {f"python/{module}" for module in modules()} <= files
    junk = (".so", ".o", ".pyc", ".png", ".safetensors")
    assert not [name for name in files if name.endswith(junk) or name.startswith((".", "tests"))]


def test_wheel_holds_the_package_and_the_extension_only(wheel):
    extension = only(n for n in names(wheel) if n.startswith("tim/_C."))
    assert package_files(wheel) == modules() | {extension, "tim/_build_info.json"}


def test_a_build_without_cuda_kernels_says_why_and_how_to_get_them(wheel):
    info = json.loads(read(wheel, "_build_info.json"))
    assert "the CUDA kernels were left out (TIM_CUDA=OFF)" in info["reason"]
    assert "TIM_CUDA=AUTO" in info["remedy"]


def test_metadata(wheel):
    metadata = email.message_from_string(read(wheel, ".dist-info/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("transition-models", "0.1.0")
    assert metadata["Requires-Python"] == ">=3.10"
    scripts = configparser.ConfigParser()
    scripts.read_string(read(wheel, ".dist-info/entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"tim": "tim.cli:main"}
    required = {line.split(";")[0] for line in metadata.get_all("Requires-Dist") if ";" not in line}
    assert "torch>=2.11" in required
    assert not any("torchvision" in line for line in metadata.get_all("Requires-Dist"))
    extras = [line for line in metadata.get_all("Requires-Dist") if "extra ==" in line]
    (flash,) = (line for line in extras if "flash-attn" in line)
    assert flash.endswith(("extra == 'flash'", 'extra == "flash"')), (
        "it cannot be built without a GPU"
    )
    assert not any("flash" in line for line in extras if line is not flash), "nor be part of all"


def test_build_needs_no_torch():
    tomllib = pytest.importorskip("tomllib")
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert [line.split(">")[0] for line in build_system["requires"]] == [
        "scikit-build-core",
        "pybind11",
    ]


def test_extension_of_the_wheel_runs_without_torch(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    path = only((tmp_path / "tim").glob("_C.*"))
    code = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {str(path)!r})\n"
        "C = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(C)\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps([C.build_info(), C.cpu.isa()]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    info, isa = json.loads(result.stdout)
    assert info == json.loads(read(wheel, "_build_info.json"))
    assert isa in info["isa"]
    assert info["cuda"] is None


def test_kernel_objects_share_no_functions(wheel):
    """A function that two instruction sets share would run AVX-512 code on machines without it."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    folder = wheel.parent / "objects" / "CMakeFiles"
    objects = [*folder.glob("tim_*.dir/**/*.o")]
    copies = {path.relative_to(folder).parts[0] for path in objects}
    isas = json.loads(read(wheel, "_build_info.json"))["isa"]
    assert copies == {f"tim_{isa}.dir" for isa in isas}
    for path in objects:
        listing = subprocess.run([nm, "-C", path], capture_output=True, text=True, check=True)
        symbols = [line.split(maxsplit=2)[-2:] for line in listing.stdout.splitlines()]
        weak = [name for kind, name in symbols if kind in "WVu" and "personality" not in name]
        assert not weak, f"{path.name}: {weak}"


def test_without_a_compiler_the_wheel_is_pure_and_says_why(pure_wheel):
    assert package_files(pure_wheel) == modules() | {"tim/_build_info.json"}
    info = json.loads(read(pure_wheel, "_build_info.json"))
    assert info["compiler"] is None
    assert info["isa"] == []
    assert "no working C++ compiler was found (CXX is /nonexistent/c++)" in info["reason"]
    assert "install" in info["remedy"]


def test_a_compile_error_fails_the_build(source, tmp_path):
    need_compiler()
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    header = broken / "csrc" / "kernels.h"
    header.write_text('#error "broken on purpose"\n' + header.read_text())
    result = build("wheel", broken, tmp_path / "out")
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout + result.stderr
    assert not [*(tmp_path / "out").glob("*.whl")]


def test_cuda_on_without_nvcc_fails_the_build(source, tmp_path):
    need_compiler()
    result = build("wheel", source, tmp_path, TIM_CUDA="ON", CUDACXX="/nonexistent/nvcc")
    assert result.returncode != 0
    assert "TIM_CUDA=ON, but nvcc was not found" in result.stdout + result.stderr
