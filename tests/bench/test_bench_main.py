"""Real runs at tiny sizes, through the command line."""

import json
from dataclasses import replace

import pytest
import torch

# Takes sizes from `step` when it is first imported, which must not be in the fixture below.
import tim.bench.derivative
import tim.bench.sampling
from tim.bench import cases, main, measure, step, summary
from tim.bench.cases import Size
from tim.bench.step import StepSize
from tim.models import TiM, TiMConfig

TINY = Size("tiny", 1, 6, 2, 8, 24, (4, 4, 4), 4)
QUICK = ("--device", "cpu", "--seconds", "0.001", "--threads", "1")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(cases.SIZES, "cpu", (TINY,))
    config = TiMConfig(
        input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10, lora_hidden_size=8
    )
    monkeypatch.setitem(step.STEP_SIZES, "cpu", (StepSize("tiny", config, 10),))
    monkeypatch.setattr("tim.bench.machine._COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr("tim.bench.machine._MATMUL_SIZE", {"cpu": 32})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_run_writes_what_it_shows(tmp_path, capsys) -> None:
    path = tmp_path / "result.json"
    arguments = ["swiglu", "interpolate", "--dtypes", "float32", "--json", str(path), *QUICK]
    assert main(arguments) == 0
    result = json.loads(path.read_text())
    assert result["machine"]["device"] == "cpu" and result["machine"]["threads"] == 1
    (run,) = result["runs"]
    assert run["command"] == "tim bench " + " ".join(arguments)
    assert run["limits"]["copy_bytes_per_second"] > 0
    assert run["limits"]["matmul_flops_per_second"]["float32"] > 0
    assert run["failures"] == []
    assert [(row["benchmark"], row["direction"]) for row in result["rows"]] == [
        ("swiglu", "forward"), ("swiglu", "backward"), ("swiglu", "tangent"),
        ("interpolate", "forward"),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["size"] == "tiny" and row["dtype"] == "float32"
        assert set(row["candidates"]) == {"tim", "reference"}
        for candidate in row["candidates"].values():
            assert 0 < candidate["times"]["minimum"] <= candidate["times"]["median"]
            assert candidate["error"] < 1e-5
            assert candidate["peak_bytes"] > 0
        assert row["copy_share"] > 0 and row["traffic_bytes"] > 0
        assert row["residence"] in (*result["machine"]["caches"], "memory")
    shown = capsys.readouterr().out
    assert "swiglu" in shown and "of copy" in shown


def test_the_overhead_of_every_operation_is_measured_on_a_few_elements(tmp_path, capsys) -> None:
    path = tmp_path / "result.json"
    assert main(["overhead", "--json", str(path), *QUICK]) == 0
    result = json.loads(path.read_text())
    assert [(row["benchmark"], row["direction"]) for row in result["rows"]] == [
        (operation.name, direction)
        for operation in cases.OPERATIONS
        for direction in operation.directions
    ]
    for row in result["rows"]:
        assert (row["size"], row["dtype"]) == ("few", "float32")
        assert row["candidates"]["tim"]["times"]["median"] > 0
    for operation in cases.OPERATIONS:
        inputs = operation.inputs(cases.FEW, lambda *shape, wide=False: torch.empty(shape))
        assert max(tensor.numel() for tensor in inputs) <= 96
    capsys.readouterr()
    summary.show(result)
    assert capsys.readouterr().out == "", "they are no speeds of operations"
    assert main(["overhead", "--directions", "tangent", "--json", str(path), *QUICK]) == 0
    directions = {row["direction"] for row in json.loads(path.read_text())["rows"]}
    assert directions == {"tangent"}


def test_options_choose_what_runs(tmp_path) -> None:
    path = tmp_path / "result.json"
    options = ["--dtypes", "bfloat16", "--directions", "backward", "--json", str(path)]
    assert main(["adaln", *options, *QUICK]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["benchmark"] for row in rows] == ["adaln", "gated_adaln"]
    assert {(row["dtype"], row["direction"]) for row in rows} == {("bfloat16", "backward")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["softmax"], "operation must be one of interpolate, "),
        (["swiglu", "--sizes", "huge"], "--sizes must be among tiny, got 'huge'"),
        (["swiglu", "--dtypes", "int8"], "must be among float32, bfloat16, float16, got 'int8'"),
        (
            ["interpolate", "--directions", "tangent", "--sizes", "tiny"],
            "--directions of interpolate must be among forward, got 'tangent'",
        ),
        (["--threads", "0"], "--threads: must be a positive whole number, got '0'"),
        (["--seconds", "-1"], "--seconds: must be a positive number of seconds, got '-1'"),
        (["--seconds", "nan"], "--seconds: must be a positive number of seconds, got 'nan'"),
        (["--json", "no/such/x.json"], "must be in a folder that exists, got 'no/such/x.json'"),
        (["--json", "."], "--json: must be a file, got the folder '.'"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no CUDA device"),
        (["swiglu", "--steps", "2"], "--steps and --batches are of sampling"),
        (["--sampling", "--steps", "1,0"], "must be positive numbers, got '1,0'"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("tim.bench.machine.limits", lambda *_: pytest.fail("measures already"))
    with pytest.raises(SystemExit) as stop:
        main([*QUICK, *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tim bench: ") and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training", "--threads", "0"], "--threads: must be a positive whole number, got '0'"),
        (["training", "--seconds", "0"], "--seconds: must be a positive number of seconds"),
        (["training", "--ranks", "1,two"], "--ranks: must be positive numbers, got '1,two'"),
        (["training", "--device", "cuda"], "--device cuda: PyTorch finds no CUDA device"),
        (["training", "--json", "no/such/x.json"], "must be in a folder that exists"),
        (["launches", "--device", "cuda"], "--device cuda: PyTorch finds no CUDA device"),
        (["launches", "--json", "no/such/x.json"], "must be in a folder that exists"),
    ],
)
def test_mistakes_of_the_other_benchmarks_too(arguments, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tim bench {arguments[0]}: ") and message in line


def test_sizes_are_measured_in_the_order_that_was_asked_for(monkeypatch, tmp_path) -> None:
    other = replace(TINY, name="other")
    monkeypatch.setitem(cases.SIZES, "cpu", (TINY, other))
    path = tmp_path / "result.json"
    options = ["--sizes", "other,tiny", "--dtypes", "float32", "--directions", "forward"]
    assert main(["swiglu", "interpolate", *options, "--json", str(path), *QUICK]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["size"], row["benchmark"]) for row in rows] == [
        ("other", "swiglu"), ("other", "interpolate"), ("tiny", "swiglu"), ("tiny", "interpolate"),
    ]  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_failure_is_reported_and_the_rest_still_runs(tmp_path, monkeypatch, capsys) -> None:
    def broken(gate, up):
        raise RuntimeError("broken kernel")

    swiglu = next(operation for operation in cases.OPERATIONS if operation.name == "swiglu")
    object.__setattr__(swiglu, "op", broken)
    path = tmp_path / "result.json"
    try:
        arguments = ["swiglu", "interpolate", "--dtypes", "float32", "--json", str(path), *QUICK]
        assert main(arguments) == 1
    finally:
        object.__setattr__(swiglu, "op", cases.ops.swiglu)
    result = json.loads(path.read_text())
    assert [row["benchmark"] for row in result["rows"]] == ["interpolate"]
    assert len(result["runs"][0]["failures"]) == 3
    assert "failed: swiglu tiny float32 forward: RuntimeError: broken kernel" in (
        capsys.readouterr().out
    )


def test_a_rival_that_fails_leaves_a_note(monkeypatch) -> None:
    monkeypatch.setattr(measure, "why_no_compile", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *inputs: 1 / 0)
    row = measure.measure(
        cases.operations_of("swiglu")[0], TINY, torch.float32, "forward",
        measure.Settings(torch.device("cpu"), seconds=0.001, compile=True),
    )  # fmt: skip
    assert set(row.candidates) == {"tim", "reference"}
    assert row.notes == ["compile failed: ZeroDivisionError: division by zero"]


def test_without_memory_for_all_those_that_need_most_are_left_out(monkeypatch) -> None:
    compare = measure.compare

    def compare_few(functions, *rest):
        if len(functions) > room:
            raise torch.OutOfMemoryError("no memory\nat all")
        return compare(functions, *rest)

    def hog(size):
        def interpolate(x, *others):
            torch.empty(size)
            return cases.ops.interpolate_reference(x, *others)

        return interpolate

    monkeypatch.setattr(measure, "compare", compare_few)
    rivals = {"most": hog(1 << 20), "little": hog(1), "much": hog(1 << 19)}
    measured = (
        cases.operations_of("interpolate")[0], TINY, torch.float32, "forward",
        measure.Settings(torch.device("cpu"), seconds=0.001), lambda *_: rivals,
    )  # fmt: skip
    for room, left in ((6, [*rivals]), (5, ["little", "much"]), (4, ["little"]), (2, [])):
        row = measure.measure(*measured)
        names = ["tim", "reference", *left] if room > 2 else ["tim"]
        assert list(row.candidates) == names
        assert len(row.notes) == 5 - len(names)
        notes = [f"{name} left out, no memory: no memory" for name in ("most", "much")]
        assert row.notes[:2] == notes[: len(row.notes)]
    room = 1
    with pytest.raises(torch.OutOfMemoryError):
        measure.measure(*measured)


def test_no_compiler_leaves_a_note(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    row = measure.measure(
        cases.operations_of("interpolate")[0], TINY, torch.float32, "forward",
        measure.Settings(torch.device("cpu"), seconds=0.001, compile=True),
    )  # fmt: skip
    assert row.notes == ["torch.compile needs a C++ compiler: no no-such-compiler"]


def test_steps_compare_both_derivatives(tmp_path, capsys) -> None:
    path = tmp_path / "result.json"
    assert main(["step", "--json", str(path), *QUICK]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["benchmark"] == "step" and row["shape"]["batch"] == 10
    assert list(row["candidates"]) == ["jvp", "jvp, references", "dde", "dde, references"]
    config = step.STEP_SIZES["cpu"][0].config
    gradients = 4 * sum(parameter.numel() for parameter in TiM(config).parameters())
    for name, candidate in row["candidates"].items():
        assert candidate["peak_bytes"] > gradients, "they are part of a step, the last one's not"
        assert (candidate["error"] < 1e-5) == name.startswith("jvp")
    assert "dde, references" in capsys.readouterr().out


def test_sampling_is_measured_by_number_of_steps(tmp_path, capsys, monkeypatch) -> None:
    path, taken = tmp_path / "result.json", set()
    sample = tim.bench.sampling.sample

    def counted(network, y, noise, steps, **options):
        taken.add((len(noise), steps))
        return sample(network, y, noise, steps, **options)

    monkeypatch.setattr("tim.bench.sampling.sample", counted)
    assert main(["--sampling", "--steps", "1,3", "--json", str(path), *QUICK]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["size"], row["direction"], row["shape"]["steps"]) for row in rows] == [
        ("tiny x 1", "1 step", 1), ("tiny x 1", "3 steps", 3),
        ("tiny x 10", "1 step", 1), ("tiny x 10", "3 steps", 3),
    ]  # fmt: skip
    for row in rows:
        assert row["benchmark"] == "sampling" and list(row["candidates"]) == [
            "tim", "tim, references",
        ]  # fmt: skip
        assert all(candidate["error"] < 1e-5 for candidate in row["candidates"].values())
    assert taken == {(1, 1), (1, 3), (10, 1), (10, 3)}
    shown = capsys.readouterr().out
    assert "steps" in shown and "tiny x 10" in shown and "derivative error" not in shown
    summary.show(json.loads(path.read_text()))
    assert "tiny x 10" in capsys.readouterr().out


def test_sampling_in_bfloat16_through_a_compiler(tmp_path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr("tim.bench.sampling.why_no_compile", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda model, **how: calls.append(how) or model)
    path = tmp_path / "result.json"
    options = ["--dtypes", "bfloat16", "--batches", "2", "--steps", "2,4", "--compile"]
    assert main(["sampling", *options, "--json", str(path), *QUICK]) == 0
    assert calls == [{"dynamic": False}], "once for all numbers of steps"
    for row in json.loads(path.read_text())["rows"]:
        assert (row["size"], row["dtype"]) == ("tiny x 2", "bfloat16")
        assert list(row["candidates"]) == ["tim", "tim, compiled", "tim, references"]
        assert all(1e-4 < c["error"] < 0.1 for c in row["candidates"].values())


def test_a_network_that_cannot_be_compiled_leaves_a_note(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tim.bench.sampling.why_no_compile", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda *inputs: 1 / 0)
    path = tmp_path / "result.json"
    options = ["--batches", "1", "--steps", "1", "--compile", "--json", str(path)]
    assert main(["sampling", *options, *QUICK]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert list(row["candidates"]) == ["tim", "tim, references"]
    assert row["notes"] == ["tim, compiled failed: ZeroDivisionError: division by zero"]


def test_a_step_leaves_the_weights_alone() -> None:
    size = step.STEP_SIZES["cpu"][0]
    setup = step.Setup.random(size, torch.float32, torch.device("cpu"))
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    candidate = step.own_candidates(setup)["jvp"]
    take = candidate.step()
    first, second = take(), take()
    assert torch.equal(first, second) and (first > 0).sum() == 3  # all but the projection loss
    assert candidate.objective()[1].abs().max() > 0
    for name, value in setup.model.state_dict().items():
        assert torch.equal(value, before[name])
