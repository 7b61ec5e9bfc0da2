"""The script that no machine of ours runs to its end: at least it parses and leaves nothing out."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tim import ops
from tim.bench.cases import ATTENTION_SIZES, OBJECTIVE_SIZES, SIZES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@bash
def test_the_script_parses() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def dry_run(*options: str) -> str:
    command = ["bash", str(SCRIPT), "--dry-run", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


PART = re.compile(r"^(goal|part) (\S+): (\d+) s, at most (\d+): (.*)$", re.M)


def plan(*options: str) -> list[tuple[str, str, int, int, list[str]]]:
    """(kind, name, share, limit, words of the command) of every part, in order."""
    return [
        (kind, name, int(share), int(limit), shlex.split(command))
        for kind, name, share, limit, command in PART.findall(dry_run(*options))
    ]


def deadline(*options: str) -> int:
    return int(re.match(r"(\d+) s for all parts", dry_run(*options)).group(1))


@bash
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_benchmark_runs(device) -> None:
    parts = plan("--device", device)
    scripts = {words[2] for *_, words in parts if words[0] == "bench"}
    operations = {w for *_, words in parts if words[0] == "bench_operations" for w in words[2:]}
    # Reading data is the host's work, and making JPEG files takes more than torch and numpy.
    there = {path.stem[6:] for path in SCRIPT.parent.glob("bench_*.py")} - {"data"}
    assert scripts | (operations & there) == there
    assert set(ops.available()) <= scripts | operations
    # Each writes a file of its own, by which a second call replaces it.
    results = [(name, words[1]) for _, name, *_, words in parts if words[0].startswith("bench")]
    assert all(name == result for name, result in results)
    assert len({name for name, _ in results}) == len(results)


@bash
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_parts_that_decide_the_goals_have_time_of_their_own(device) -> None:
    parts, time = plan("--device", device), deadline("--device", device)
    assert time + 25 + 10 <= 590, "a machine ends a command after 600 s"
    kinds = [kind for kind, *_ in parts]
    goals = kinds.count("goal")
    assert kinds == ["goal"] * goals + ["part"] * (len(parts) - goals)
    shares = [share for _, _, share, *_ in parts]
    assert sum(shares[:goals]) <= time
    for i, (_, name, share, limit, _) in enumerate(parts):
        assert share <= limit <= 2 * share
        # Even one that takes all that it may, while those before it took no time, leaves the
        # others their shares; only the build, without which there is nothing, may not.
        assert name == "build" or limit + sum(shares[i + 1 : goals]) <= time


@bash
def test_what_the_goals_are_about_is_measured_before_the_rest() -> None:
    parts = {name: (kind, words) for kind, name, *_, words in plan()}
    order = [name for name, (kind, _) in parts.items() if kind == "goal"]
    assert order == [
        "build", "tests", "objective", "block", "attention-tangent", "attention-forward",
        "derivative", "step", "sampling",
    ]  # fmt: skip
    bound_by_memory = {*parts["objective"][1], *parts["block"][1]}
    assert set(ops.available()) - {"attention"} <= bound_by_memory
    for name in ("objective", "block"):
        words = parts[name][1]
        assert "--compile" in words and words[words.index("--dtypes") + 1] == "bfloat16"
        sizes = words[words.index("--sizes") + 1].split(",")
        assert sizes[:2] == ["xl2-256", "xl1-1024"]
        assert set(sizes) <= {size.name for size in SIZES["cuda"] + OBJECTIVE_SIZES["cuda"]}
        slower = parts[f"{name}-float32"][1]
        assert "--compile" in slower and slower[slower.index("--dtypes") + 1] == "float32"
    for name in ("attention-tangent", "attention-forward", "attention-backward"):
        words = parts[name][1]
        assert words[words.index("--dtypes") + 1] == "bfloat16", "float32 has no kernel on a GPU"
        sizes = words[words.index("--sizes") + 1].split(",")
        assert sizes[:3] == ["n16384-d128", "n16384-d72", "n16384-d64"]
        assert set(sizes) == {size.name for size in ATTENTION_SIZES["cuda"]}
    assert parts["float16"][1][-1] == "float16"


@bash
def test_a_second_call_runs_what_was_lost(tmp_path) -> None:
    names = [name for _, name, *_ in plan("--only", "step,objective", "--seconds", "200")]
    assert names == ["objective", "step"]
    (tmp_path / "benchmarks").mkdir()
    script = Path(shutil.copy(SCRIPT, tmp_path / "benchmarks"))
    call = ["bash", str(script), "--device", "cpu", "--only", "step,objective", "--seconds"]

    def run(seconds: str, python: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHON": python}
        return subprocess.run([*call, seconds], capture_output=True, text=True, env=environment)

    refused = run("40", "true")
    assert refused.returncode == 2 and "needs an earlier build" in refused.stderr
    built = tmp_path / "build/gpu_check/site/tim/_build_info.json"
    built.parent.mkdir(parents=True)
    built.touch()
    kept = tmp_path / "build/gpu_check/parts/tests.json"
    kept.parent.mkdir()
    kept.touch()
    late = run("40", "true")
    assert late.returncode == 1 and "step: no time left" in late.stdout
    again = "gpu_check.sh --only objective,step --device cpu --seconds 590 "
    assert "lost for time: objective step\n" in late.stdout and again in late.stdout
    assert run("200", "true").stdout.splitlines()[-1].startswith("all parts passed in ")
    broken = run("200", "false")
    assert broken.returncode == 1 and "step: exit code 1" in broken.stdout
    assert "lost" not in broken.stdout and kept.exists()


@bash
def test_nothing_is_measured_without_a_build(tmp_path) -> None:
    (tmp_path / "benchmarks").mkdir()
    script = Path(shutil.copy(SCRIPT, tmp_path / "benchmarks"))
    answer = subprocess.run(
        ["bash", str(script), "--device", "cpu"],
        capture_output=True, text=True, env={**os.environ, "PYTHON": "false"},
    )  # fmt: skip
    assert answer.returncode == 1 and "the build failed" in answer.stderr
    assert "== tests" not in answer.stdout


def test_all_tests_that_are_marked_for_a_gpu_are_where_the_script_looks() -> None:
    tests = SCRIPT.parents[1] / "tests"
    marked = [path for path in tests.rglob("*.py") if "mark.gpu" in path.read_text()]
    folders = {path.parent for path in marked if path != Path(__file__)}
    assert folders == {tests, tests / "ops", tests / "emulator"}
    text = SCRIPT.read_text()
    for place in ("$root/tests/ops", "$root/tests/emulator", '"$root"/tests/test_*.py'):
        assert place in text


@bash
def test_a_dry_run_leaves_nothing(tmp_path) -> None:
    assert dry_run(str(tmp_path / "results")) and not (tmp_path / "results").exists()


@bash
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fast"], "unknown option --fast"),
        (["--device", "tpu"], "--device must be cuda or cpu, got 'tpu'"),
        (["--seconds", "ten"], "--seconds must be a positive whole number, got 'ten'"),
        (["--only", "step,all"], "--only must be among build tests .*, got 'all'"),
    ],
)
def test_a_wrong_option_is_refused(options, message) -> None:
    command = ["bash", str(SCRIPT), *options]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 2 and re.fullmatch(message, answer.stderr.removesuffix("\n"))


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
def test_another_installation_is_not_measured_in_its_place(tmp_path) -> None:
    function = re.search(r"^check_build\(\) \{\n.*?^\}", SCRIPT.read_text(), re.M | re.S)
    answer = subprocess.run(
        ["bash", "-c", f"{function.group()}\ncheck_build"],
        env={"python": sys.executable, "site": str(tmp_path), "device": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 1
    assert re.match(r"Python takes tim from .*__init__\.py: uninstall that", answer.stderr)


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
