"""Result documents as tables for people: by rich where it is installed, else in plain columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence

MISSING = "-"
_OPERATION_HEADINGS = (
    "operation", "size", "dtype", "direction", "runs on", "time", "spread", "reference", "compile",
    "attained", "cache", "error", "ref. error", "memory",
)  # fmt: skip
#: Candidates that have columns of the table of operations.
_USUAL = {"tim", "reference", "compile"}
#: Whole steps by benchmark, and what their errors are of.
STEPS = {
    "step": "derivative error", "sampling": "error", "training": "derivative error",
    "derivative operator": "error", "derivative step": "derivative error",
}  # fmt: skip


def show(result: dict) -> None:
    """Print a result document."""
    machine = result["machine"]
    print(f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}")
    for run in result["runs"]:
        print(limits_line(run))
    operations = [row for row in result["rows"] if row["benchmark"] not in STEPS]
    if operations:
        lines = [operation_cells(row, matmul_rate(result, row)) for row in operations]
        show_table(_OPERATION_HEADINGS, lines)
    show_rivals(result)
    show_steps(result)
    for note in dict.fromkeys(
        f"{row['benchmark']} {row['size']} {row['dtype']} {row['direction']}: {note}"
        for row in result["rows"]
        for note in row["notes"]
    ):
        print(f"note: {note}")


def show_rivals(result: dict) -> None:
    """Print a line for each candidate where there are more than ours and the reference."""
    rows = [
        row
        for row in result["rows"]
        if row["benchmark"] not in STEPS and set(row["candidates"]) - _USUAL
    ]
    headings = (
        "operation", "size", "dtype", "direction", "by", "time", "spread", "first / this",
        "TFLOP/s", "memory", "error",
    )  # fmt: skip
    if rows:
        show_table(headings, [cells for row in rows for cells in rival_cells(row)])


def rival_cells(row: dict) -> list[tuple[str, ...]]:
    """A line for each candidate; FLOPs are those of the operation, whatever a rival computes."""
    first = next(iter(row["candidates"].values()))["times"]["median"]
    return [
        (
            *(row[key] for key in ("benchmark", "size", "dtype", "direction")), name,
            seconds(c["times"]["median"]), spread(c["times"]),
            f"{first / c['times']['median']:.2f}",
            f"{row['flops'] / c['times']['median'] / 1e12:.3g}" if row["flops"] else MISSING,
            size(c["peak_bytes"]), number(c["error"]),
        )
        for name, c in row["candidates"].items()
    ]  # fmt: skip


def show_steps(result: dict) -> None:
    """Print the whole steps of a document and what failed in its runs."""
    for benchmark, error in STEPS.items():
        rows = [row for row in result["rows"] if row["benchmark"] == benchmark]
        headings = (
            "size", "dtype", benchmark, "time", "spread", "first / this", "memory", error,
        )  # fmt: skip
        lines = [cells for row in rows for cells in step_cells(row)]
        if benchmark == "sampling":
            headings = ("steps", *headings)
            counts = [row["shape"].get("steps", 1) for row in rows for _ in row["candidates"]]
            lines = [(str(n), *cells) for n, cells in zip(counts, lines, strict=True)]
        if rows:
            show_table(headings, lines)
    for failure in (failure for run in result["runs"] for failure in run["failures"]):
        print(f"failed: {failure}")


def limits_line(run: dict) -> str:
    limits = run["limits"]
    rates = (
        f"{name} {rate / 1e12:.3g} TFLOP/s"
        for name, rate in limits["matmul_flops_per_second"].items()
    )
    copy = limits["copy_bytes_per_second"] / 1e9
    return f"{run['command']}: copies at {copy:.3g} GB/s, matrix products at {', '.join(rates)}"


def operation_cells(row: dict, matmul_rate: float | None) -> tuple[str, ...]:
    """One line: speedups of tim over the column's candidate, memory of tim over the reference's."""
    own, reference = row["candidates"]["tim"], row["candidates"].get("reference")
    if row["flops"]:
        share = f" {row['flops_per_second'] / matmul_rate:.0%} of matmul" if matmul_rate else ""
        attained = f"{row['flops_per_second'] / 1e12:.3g} TFLOP/s{share}"
    else:
        attained = f"{row['bytes_per_second'] / 1e9:.3g} GB/s {row['copy_share']:.0%} of copy"
    memory = MISSING
    if reference and reference["peak_bytes"]:
        memory = f"{own['peak_bytes'] / reference['peak_bytes']:.2f}x"
    return (
        row["benchmark"], row["size"], row["dtype"], row["direction"],
        row["runs_on"].split(":")[0], seconds(own["times"]["median"]), spread(own["times"]),
        factor(row["speedups"].get("reference")), factor(row["speedups"].get("compile")), attained,
        row["residence"], number(own["error"]), number(reference and reference["error"]), memory,
    )  # fmt: skip


def step_cells(row: dict) -> list[tuple[str, ...]]:
    """A line for each candidate; "first / this": time of the first candidate over that of this."""
    first = next(iter(row["candidates"].values()))["times"]["median"]
    return [
        (
            row["size"], row["dtype"], name, seconds(c["times"]["median"]), spread(c["times"]),
            f"{first / c['times']['median']:.2f}", size(c["peak_bytes"]), number(c["error"]),
        )
        for name, c in row["candidates"].items()
    ]  # fmt: skip


def show_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(headings, lines))
        return
    # A log file has no width: cutting the columns to 80 there would lose them.
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(*headings, box=None, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def plain(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns padded with blanks."""
    rows = [tuple(headings), *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(padded)


def seconds(value: float) -> str:
    scale, unit = next(
        (pair for pair in ((1.0, "s"), (1e-3, "ms")) if value >= pair[0]), (1e-6, "us")
    )
    return f"{value / scale:.3g} {unit}"


def spread(times: dict) -> str:
    """Distance between the quartiles as a share of the median."""
    return f"{(times['upper_quartile'] - times['lower_quartile']) / times['median']:.0%}"


def size(value: int) -> str:
    return f"{value / 2**20:.4g} MiB"


def factor(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}x"


def number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1e}"


def matmul_rate(result: dict, row: dict) -> float | None:
    """FLOP/s of a large product in the dtype of a row, measured in its run."""
    return result["runs"][row["run"]]["limits"]["matmul_flops_per_second"].get(row["dtype"])
