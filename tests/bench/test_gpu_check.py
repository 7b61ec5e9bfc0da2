"""The script that no machine of ours runs to its end: at least it parses and leaves nothing out."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tim import ops

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@bash
def test_the_script_parses() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_every_operation_is_benchmarked() -> None:
    loop = re.search(r"for operation in (.*); do", SCRIPT.read_text())
    assert set(loop.group(1).split()) == set(ops.available())


@bash
@pytest.mark.parametrize("inner", [".", "share/cmake/pybind11", "pybind11/share/cmake/pybind11"])
def test_pybind11_is_found_in_a_folder_named_by_the_environment(inner, tmp_path) -> None:
    folder = tmp_path / inner
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pybind11Config.cmake").touch()
    assert Path(find_pybind11(tmp_path).stdout.strip()).samefile(folder)


@bash
def test_a_folder_without_pybind11_is_an_error(tmp_path) -> None:
    answer = find_pybind11(tmp_path)
    assert answer.returncode == 1
    assert answer.stderr.strip() == f"no pybind11Config.cmake under {tmp_path}"


def find_pybind11(folder: Path) -> subprocess.CompletedProcess:
    function = re.search(r"^find_pybind11\(\) \{\n.*?^\}", SCRIPT.read_text(), re.M | re.S)
    return subprocess.run(
        ["bash", "-c", f"{function.group()}\nfind_pybind11"],
        env={"PYBIND11_DIR": str(folder)}, capture_output=True, text=True,
    )  # fmt: skip


def test_needs_torch_and_numpy_alone():
    code = """
import sys
for name in ("yaml", "safetensors", "huggingface_hub", "tyro", "rich", "PIL", "matplotlib"):
    sys.modules[name] = None
import tim.bench.derivative, tim.bench.launch_report, tim.bench.step
from tim import models
model = models.TiM(models.TiMConfig(hidden_size=16, num_heads=2, depth=1))
for call in (model.save_pretrained, model.push_to_hub, model.from_pretrained):
    try:
        call("x")
    except ImportError as error:
        assert "needs the package safetensors" in str(error), error
    else:
        raise AssertionError(call)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
