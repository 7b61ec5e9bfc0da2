"""Ratios, shares, result files and tables."""

import json

import pytest

from tim.bench import report, summary, table
from tim.bench.report import Candidate, Row
from tim.bench.timing import Times


def times(median: float) -> Times:
    return Times.of([0.9 * median, median, 1.2 * median], calls_per_sample=1, method="loop")


def candidate(median: float, peak: int = 100, error: float = 1e-7) -> Candidate:
    return Candidate(times(median), peak, error)


def operation_row(**changes) -> Row:
    values = {
        "benchmark": "swiglu",
        "size": "small",
        "shape": {"batch": 1},
        "dtype": "float32",
        "direction": "forward",
        "device": "cpu",
        "runs_on": "cpu kernel",
        "candidates": {
            "tim": candidate(2e-3, 50, 1e-7),
            "reference": candidate(5e-3, 100, 2e-7),
            "compile": candidate(1e-3),
        },
        "copy": times(1e-3),
        "traffic_bytes": 8_000_000,
        "residence": "L3",
    }
    return Row(**{**values, **changes})


def step_row() -> Row:
    return Row(
        benchmark="step", size="small", shape={}, dtype="float32", direction="step", device="cpu",
        runs_on="cpu kernels of swiglu",
        candidates={"jvp": candidate(0.8, 2**20), "public dde": candidate(1.0, 2**21, 1e-3)},
    )  # fmt: skip


def document(*rows: Row, name: str = "machine") -> dict:
    machine = {"device": "cpu", "name": name, "threads": 2, "torch": "2"}
    limits = {"copy_bytes_per_second": 1e10, "matmul_flops_per_second": {"float32": 1e11}}
    run = {"command": "tim bench", "date": "today", "limits": limits, "failures": []}
    return json.loads(json.dumps(report.document(machine, run, rows)))


def test_speedup_is_the_rivals_time_over_ours() -> None:
    row = operation_row()
    assert row.speedup("reference") == pytest.approx(2.5)
    assert row.speedup("compile") == pytest.approx(0.5)
    assert row.speedup("something else") is None
    assert list(row.speedups) == ["reference", "compile"]


def test_bandwidth_is_compared_with_a_copy_of_as_many_bytes() -> None:
    row = operation_row()
    assert row.bytes_per_second == pytest.approx(4e9)
    assert row.copy_share == pytest.approx(0.5)
    assert row.flops_per_second is None
    assert operation_row(flops=6e9).flops_per_second == pytest.approx(3e12)


def test_rows_without_traffic_have_no_bandwidth() -> None:
    row = step_row()
    assert row.bytes_per_second is None
    assert row.copy_share is None
    assert row.speedups == {"public dde": pytest.approx(1.25)}


def test_a_result_file_holds_measured_and_derived_values(tmp_path) -> None:
    path = tmp_path / "result.json"
    report.save(report.document({"device": "cpu"}, {"command": "c"}, [operation_row()]), path)
    result = json.loads(path.read_text())
    assert list(result) == ["schema", "machine", "runs", "rows"]
    assert result["schema"] == report.SCHEMA
    (row,) = result["rows"]
    assert row["run"] == 0
    assert row["candidates"]["tim"]["times"]["median"] == 2e-3
    assert row["candidates"]["reference"]["error"] == 2e-7
    assert row["speedups"] == {"reference": pytest.approx(2.5), "compile": pytest.approx(0.5)}
    assert row["copy_share"] == pytest.approx(0.5)
    assert row["residence"] == "L3"


def test_merging_keeps_every_row_with_its_run() -> None:
    merged = report.merge(
        [document(operation_row()), document(), document(step_row(), operation_row())]
    )
    assert len(merged["runs"]) == 3
    assert [row["run"] for row in merged["rows"]] == [0, 2, 2]
    assert [row["benchmark"] for row in merged["rows"]] == ["swiglu", "step", "swiglu"]


def test_merging_refuses_different_machines_and_nothing() -> None:
    with pytest.raises(ValueError, match="one machine"):
        report.merge([document(), document(name="another")])
    with pytest.raises(ValueError, match="nothing to merge"):
        report.merge([])


def test_cells_of_an_operation() -> None:
    (row,) = document(operation_row())["rows"]
    assert table.operation_cells(row, None) == (
        "swiglu", "small", "float32", "forward", "cpu kernel", "2 ms", "15%", "2.50x", "0.50x",
        "4 GB/s 50% of copy", "L3", "1.0e-07", "2.0e-07", "0.50x",
    )  # fmt: skip


def test_cells_of_an_operation_bound_by_products_and_without_reference() -> None:
    lonely = {"tim": candidate(2e-3)}
    (row,) = document(operation_row(flops=6e7, candidates=lonely))["rows"]
    cells = table.operation_cells(row, 1e11)
    assert "0.03 TFLOP/s 30% of matmul" in cells
    assert cells.count(table.MISSING) == 4


def test_cells_of_a_step() -> None:
    (row,) = document(step_row())["rows"]
    ours, theirs = table.step_cells(row)
    assert ours[2:4] == ("jvp", "800 ms") and ours[5:7] == ("1.00", "1 MiB")
    assert theirs[2:4] == ("public dde", "1 s") and theirs[5:7] == ("0.80", "2 MiB")


def test_a_table_is_complete_with_and_without_rich(monkeypatch, capsys) -> None:
    result = document(operation_row(notes=["compile failed: why"]), step_row())
    result["runs"][0]["failures"].append("swiglu huge: no memory")
    for hidden in (False, True):
        if hidden:
            monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
        table.show(result)
        shown = capsys.readouterr().out
        for text in ("2.50x", "50% of copy", "public dde", "1.0e-03", "10 GB/s",
                     "note: swiglu small float32 forward: compile failed: why",
                     "failed: swiglu huge: no memory"):  # fmt: skip
            assert text in shown


def test_plain_columns_line_up() -> None:
    text = table.plain(("a", "long"), [("value", "1"), ("b", "2")])
    assert text.splitlines() == ["a      long", "value  1", "b      2"]


def test_units_of_time() -> None:
    assert [table.seconds(value) for value in (2.0, 0.25, 3e-6)] == ["2 s", "250 ms", "3 us"]


def test_summary_gives_ranges_over_sizes(tmp_path, capsys) -> None:
    slow = operation_row(size="large", candidates={
        "tim": candidate(4e-3, error=4e-7), "reference": candidate(4e-3, error=2e-7),
    })  # fmt: skip
    for name, rows in (("a", [operation_row()]), ("b", [slow, step_row()])):
        report.save(document(*rows), tmp_path / f"{name}.json")
    out = tmp_path / "all.json"
    assert summary.main([str(out), str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert len(json.loads(out.read_text())["rows"]) == 3
    shown = capsys.readouterr().out
    for text in ("1.00x-2.50x", "0.50x", "25%-50%", "2.00", "public dde"):
        assert text in shown
    assert "fastest peer" not in shown


def test_summary_names_the_fastest_of_ours_and_of_the_others_at_each_size(capsys) -> None:
    others = {"reference": candidate(9e-3), "plain": candidate(6e-3)}
    ours = {"tim": candidate(3e-3), "tim, kernel": candidate(2e-3)}
    rows = (
        operation_row(flops=1e8, candidates=ours | others),
        operation_row(size="large", flops=1e8, candidates={"tim": candidate(4e-3)}),
    )
    summary.show(document(*rows))
    lines = capsys.readouterr().out.splitlines()
    both = next(line for line in lines if "plain" in line).split()
    assert both[-9:] == ["tim,", "kernel", "2", "ms", "0.05", "50%", "plain", "3.00x", "2.00x"]
    alone = next(line for line in lines if "large" in line).split()
    assert alone[-6:] == ["ms", "0.025", "25%", "-", "-", "-"]
