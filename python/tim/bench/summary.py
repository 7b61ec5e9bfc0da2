"""`python -m tim.bench.summary OUT.json PART.json ...`: one file and a short table of several runs.

A line of the table is one operation, direction and dtype, with ranges over all sizes. Operations
bound by matrix products, which have more rivals, get a line for each size besides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tim.bench import report, table
from tim.bench.cases import FEW
from tim.bench.parser import Parser, result_file

_HEADINGS = (
    "operation", "direction", "dtype", "sizes", "over reference", "over compile", "of copy",
    "error / reference's",
)  # fmt: skip
_PRODUCTS_HEADINGS = (
    "operation", "size", "dtype", "direction", "fastest of ours", "time", "TFLOP/s", "of matmul",
    "fastest peer", "over it", "default over it",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m tim.bench.summary", description=__doc__)
    parser.add_argument("out", type=result_file, help="file to write")
    parser.add_argument("parts", nargs="+", help="result files of one machine")
    options = parser.parse_args(arguments)
    result = report.merge([json.loads(Path(path).read_text()) for path in options.parts])
    report.save(result, options.out)
    show(result)
    return 0


def show(result: dict) -> None:
    """Print the short table of a result document."""
    groups: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        if row["benchmark"] not in table.STEPS and row["size"] != FEW.name:
            key = row["benchmark"], row["direction"], row["dtype"]
            groups.setdefault(key, []).append(row)
    if groups:
        table.show_table(_HEADINGS, [line(key, rows) for key, rows in groups.items()])
    lines = [
        products_line(row, table.matmul_rate(result, row))
        for rows in groups.values()
        for row in rows
        if row["flops"]
    ]
    if lines:
        table.show_table(_PRODUCTS_HEADINGS, lines)
    table.show_steps(result)


def line(key: tuple[str, str, str], rows: Sequence[dict]) -> tuple[str, ...]:
    """Ranges over the rows of one group; `error / reference's` is the worst of them."""
    errors = [
        row["candidates"]["tim"]["error"] / row["candidates"]["reference"]["error"]
        for row in rows
        if row["candidates"].get("reference", {}).get("error")
    ]
    sizes = {row["size"] for row in rows}
    return (
        *key,
        str(len(sizes)),
        span((row["speedups"].get("reference") for row in rows), "x", 2),
        span((row["speedups"].get("compile") for row in rows), "x", 2),
        span((None if row["flops"] else 100 * row["copy_share"] for row in rows), "%", 0),
        f"{max(errors):.2f}" if errors else table.MISSING,
    )


def products_line(row: dict, matmul_rate: float | None) -> tuple[str, ...]:
    """Our fastest candidate and everybody else's, and what is the default (`tim`) over the latter.

    Candidates are ours when their names begin with "tim".
    """
    times = {name: c["times"]["median"] for name, c in row["candidates"].items()}
    ours = min((name for name in times if name.startswith("tim")), key=times.__getitem__)
    others = [name for name in times if not name.startswith("tim")]
    peer = min(others, key=times.__getitem__) if others else None
    rate = row["flops"] / times[ours]
    return (
        row["benchmark"], row["size"], row["dtype"], row["direction"], ours,
        table.seconds(times[ours]), f"{rate / 1e12:.3g}",
        f"{rate / matmul_rate:.0%}" if matmul_rate else table.MISSING,
        peer or table.MISSING,
        table.factor(times[peer] / times[ours] if peer else None),
        table.factor(times[peer] / times["tim"] if peer else None),
    )  # fmt: skip


def span(values: Iterable[float | None], unit: str, digits: int) -> str:
    """Least and largest of the values that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return table.MISSING
    low, high = (f"{value:.{digits}f}" for value in (min(known), max(known)))
    return f"{low}{unit}" if low == high else f"{low}{unit}-{high}{unit}"


if __name__ == "__main__":
    raise SystemExit(main())
