"""The rules of the layout, checked: one name per operation in every place, imports point down."""

import ast
from pathlib import Path

import pytest

import tim

ROOT = Path(__file__).parents[1]
PACKAGE = Path(tim.__file__).parent
PLACES = {
    "math": "csrc/math/{}.h",
    "cpu": "csrc/cpu/{}.cpp",
    "cuda": "csrc/cuda/{}.cu",
    "ops": "python/tim/ops/{}.py",
    "tests": "tests/ops/test_{}.py",
    "benchmarks": "benchmarks/bench_{}.py",
}
#: Lowest first; a module may import from its own layer and those below it. Every module is in one.
LAYERS = (
    ("_checks", "_checksums", "_extension", "_flags", "_imports", "images"),
    ("ops",),
    ("models",),
    ("transports",),
    ("schedule",),
    (
        "_passes",
        "derivative",
        "graphs",
        "guidance",
        "objective",
        "packed_sampling",
        "sampling_graph",
        "sampler",
    ),
    ("autoencoder", "repa", "text"),
    ("conditions", "config", "data", "ema", "frechet", "grid", "parallel", "run_lock"),
    ("checkpoint", "memory", "meter", "run_directory", "run_log", "step"),
    ("profiling",),
    ("pipeline", "presets", "service", "trainer", "evaluate", "bench"),
    ("prompt_accuracy",),
    ("cli", "commands", "encode", "info", "__main__"),
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", tim.ops.available())
def test_every_operation_is_in_every_place(name, place):
    path = ROOT / PLACES[place].format(name)
    assert path.is_file(), f"{name} is missing at {path.relative_to(ROOT)}"


def imported(path: Path) -> set[str]:
    """Names of the modules of tim that a file imports at its top level, functions left out."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tim"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tim.")
            }
    return found


def test_every_module_has_a_layer():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    modules -= {"__init__", "__pycache__"}
    assert modules == {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("layer", range(len(LAYERS)), ids=lambda i: LAYERS[i][0])
def test_imports_point_down(layer):
    above = {name for names in LAYERS[layer + 1 :] for name in names}
    for name in LAYERS[layer]:
        single = PACKAGE / f"{name}.py"
        for path in [single] if single.is_file() else sorted((PACKAGE / name).glob("*.py")):
            assert not imported(path) & above, f"{path.name} imports from a layer above it"


def test_only_the_operations_touch_the_extension():
    allowed = {"_extension.py", "info.py"}
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "ops" or path.name in allowed:
            continue
        source = path.read_text()
        assert "_extension" not in imported(path) and "tim._C" not in source, path


def test_names_of_test_files_are_unique():
    """pytest imports them by their names alone, so two of a name cannot run in one session."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
