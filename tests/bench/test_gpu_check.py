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


def dry_run(*options: str) -> str:
    command = ["bash", str(SCRIPT), "--dry-run", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@bash
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_benchmark_runs_within_its_time(device) -> None:
    planned = re.findall(r"^at most (\d+) s, .*?: (.*)$", dry_run("--device", device), re.M)
    benches = {words[1] for words in (c.split() for _, c in planned) if words[0] == "bench"}
    # Reading data is the host's work, and making JPEG files takes more than torch and numpy.
    assert benches == {path.stem[6:] for path in SCRIPT.parent.glob("bench_*.py")} - {"data"}
    assert set(ops.available()) <= benches
    assert all(0 < int(limit) <= 200 for limit, _ in planned)
    assert [command for _, command in planned][:3] == ["build", "check_build", "run_tests"]


@bash
def test_a_dry_run_leaves_nothing(tmp_path) -> None:
    assert dry_run(str(tmp_path / "results")) and not (tmp_path / "results").exists()


@bash
def test_an_unknown_option_is_refused() -> None:
    command = ["bash", str(SCRIPT), "--fast"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 2 and answer.stderr == "unknown option --fast\n"


BARE = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_tests_of_operations_and_captured_steps_need_torch_numpy_and_pytest_alone(tmp_path) -> None:
    """A file that needs more would be skipped on a GPU machine that has no more."""
    extras = (
        "yaml", "safetensors", "huggingface_hub", "tyro", "rich", "PIL", "matplotlib", "hypothesis",
        "diffusers", "transformers",
    )  # fmt: skip
    tests = SCRIPT.parents[1] / "tests"
    command = [sys.executable, "-c", BARE % (extras,), "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    files = [tests / "ops", tests / "emulator/test_on_gpu.py", tests / "test_captured.py"]
    options = ["--bare", "--collect-only", "-p", "no:hypothesispytest", "-p", "no:xdist", "-rs"]
    answer = subprocess.run([*command, *options, *map(str, files)], capture_output=True, text=True)
    assert answer.returncode == 0 and "not installed" not in answer.stdout, answer.stdout[-3000:]
    for name in ("test_adaln.py", "test_on_gpu.py", "test_captured.py"):
        assert f"{name}::" in answer.stdout


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
import tim.bench.derivative, tim.bench.launch_report, tim.bench.step, tim.bench.training
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
