"""`python -m tim.bench.summary OUT.json PART.json ...`: one file and a short table of several runs.

A line of the table is one operation, direction and dtype, with ranges over all sizes.
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


def span(values: Iterable[float | None], unit: str, digits: int) -> str:
    """Least and largest of the values that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return table.MISSING
    low, high = (f"{value:.{digits}f}" for value in (min(known), max(known)))
    return f"{low}{unit}" if low == high else f"{low}{unit}-{high}{unit}"


if __name__ == "__main__":
    raise SystemExit(main())
