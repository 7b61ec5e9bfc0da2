"""`tim bench training`: images/s and memory of training on one rank and on several, in turns.

Each number of ranks is a world of processes, with DDP between them. Every rank has a batch of the
same size to itself and as many threads, so n ranks at n times the images/s of one scale perfectly.
A round has one sample of every candidate in every world.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from tim.bench import machine, report, table
from tim.bench.measure import Settings
from tim.bench.parser import Parser, count, counts, result_file, seconds
from tim.bench.ranks import Group, Work, sizes_that_fit
from tim.bench.report import Candidate, Row
from tim.bench.step import STEP_SIZES, StepSize, kernels_of
from tim.bench.timing import MAX_ROUNDS, MIN_ROUNDS, SAMPLE_SECONDS, Times

if TYPE_CHECKING:
    from types import ModuleType

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str], peers: ModuleType | None = None) -> int:
    """Measure and print; 0, or 1 when a size failed. `peers` adds other implementations."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = parser.device(options.device)
    known = {size.name: size for size in STEP_SIZES[device.type]}
    names = options.sizes.split(",") if options.sizes else [next(iter(known))]
    for name in names:
        if name not in known:
            parser.error(f"--sizes must be among {', '.join(known)}, got {name!r}")
    ranks = sizes_that_fit(device, options.ranks)
    if not ranks:
        parser.error(f"--ranks: no devices for {min(options.ranks)} ranks")
    dtype = DTYPES[options.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    threads = max(1, options.threads // max(ranks))
    if device.type == "cpu":
        torch.set_num_threads(threads)
    settings = Settings(device, options.seconds, options.compile)
    notes = []
    if options.compile and (reason := machine.why_no_compile(device)):
        settings, notes = Settings(device, options.seconds), [reason]
    run = {
        "command": " ".join(["tim bench training", *arguments]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": options.seconds,
        "threads_per_rank": threads,
        "limits": machine.limits(device, [dtype], options.seconds),
        "failures": [],
    }
    rows: list[Row] = []
    for name in names:
        work = Work(known[name], dtype, settings, threads, peers and peers.__name__)
        try:
            rows += measure_training(work, ranks, notes)
        except RuntimeError as error:
            run["failures"].append(f"training {name}: {error}")
    result = report.document(machine.describe(device), run, rows)
    if options.json:
        report.save(result, options.json)
    show(result)
    return 1 if run["failures"] else 0


def measure_training(work: Work, ranks: Sequence[int], notes: Sequence[str] = ()) -> list[Row]:
    """A row for each number of ranks."""
    with ExitStack() as stack:
        groups = [stack.enter_context(Group(size, work)) for size in ranks]
        for group in groups:
            group.prepare()
        times = _times(groups, work.settings)
        return [_row(work, group, times[group.size], notes) for group in groups]


def _times(groups: Sequence[Group], settings: Settings) -> dict[int, dict[str, Times]]:
    """By number of ranks and candidate, measured in turns for about `seconds` each."""
    turns = [(group, name) for group in groups for name in group.prepared]
    shortest = SAMPLE_SECONDS[settings.device.type]
    passes = [max(1, math.ceil(shortest / group.sample(name, 1))) for group, name in turns]
    samples: list[list[float]] = [[] for _ in turns]
    end = time.perf_counter() + settings.seconds * len(turns)
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for i in range(len(turns)):
            turn = (number + i) % len(turns)
            group, name = turns[turn]
            samples[turn].append(group.sample(name, passes[turn]) / passes[turn])
    found: dict[int, dict[str, Times]] = {group.size: {} for group in groups}
    for (group, name), taken, calls in zip(turns, samples, passes, strict=True):
        found[group.size][name] = Times.of(taken, calls, "loop")
    return found


def _row(work: Work, group: Group, times: Mapping[str, Times], notes: Sequence[str]) -> Row:
    size: StepSize = work.size
    device = work.settings.device
    return Row(
        benchmark="training",
        size=f"{size.name} x {group.size}",
        shape={**asdict(size.config), "batch": size.batch, "ranks": group.size},
        dtype=machine.name_of(work.dtype) + ("" if work.dtype == torch.float32 else " autocast"),
        direction="step",
        device=device.type,
        runs_on=kernels_of(device),
        candidates={
            name: Candidate(times[name], prepared.peak_bytes, prepared.error)
            for name, prepared in group.prepared.items()
        },
        notes=[*notes, *group.notes],
    )


def show(result: dict) -> None:
    """Print the table of a document."""
    facts = result["machine"]
    print(f"{facts['name']}, {facts['threads']} threads a rank, torch {facts['torch']}")
    rows = result["rows"]
    alone = {row["size"]: row for row in rows if row["shape"]["ranks"] == 1}
    headings = (
        "size x ranks", "step", "time", "spread", "images/s", "first / this", "of perfect scaling",
        "memory", "derivative error",
    )  # fmt: skip
    lines = []
    for row in rows:
        name = row["size"].removesuffix(str(row["shape"]["ranks"]))
        lines += row_cells(row, alone.get(f"{name}1"))
    if lines:
        table.show_table(headings, lines)
    for note in dict.fromkeys(f"{row['size']}: {note}" for row in rows for note in row["notes"]):
        print(f"note: {note}")
    for failure in (failure for run in result["runs"] for failure in run["failures"]):
        print(f"failed: {failure}")


def row_cells(row: dict, one: dict | None) -> list[tuple[str, ...]]:
    """A line for each candidate; `one` is the row of one rank, which tells how it scales."""
    first = next(iter(row["candidates"].values()))["times"]["median"]
    lines = []
    for name, candidate in row["candidates"].items():
        times = candidate["times"]
        images = row["shape"]["batch"] * row["shape"]["ranks"]
        scaling = table.MISSING
        if one is not None and one is not row and name in one["candidates"]:
            scaling = f"{one['candidates'][name]['times']['median'] / times['median']:.0%}"
        lines.append((
            row["size"], name, table.seconds(times["median"]), table.spread(times),
            f"{images / times['median']:.4g}", f"{first / times['median']:.2f}", scaling,
            table.size(candidate["peak_bytes"]), table.number(candidate["error"]),
        ))  # fmt: skip
    return lines


def _parser() -> Parser:
    parser = Parser(prog="tim bench training", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--sizes", metavar="SIZE,...", help="the first that the device has")
    add("--dtype", choices=tuple(DTYPES), help="float32, on a GPU bfloat16")
    add("--ranks", type=counts, default=(1, 2), metavar="N,...", help="numbers of processes (1,2)")
    add("--threads", type=count, default=2, help="of a CPU, of all ranks of a world together (2)")
    add("--seconds", type=seconds, default=2.0, help="for each step of the comparison (2)")
    add("--compile", action="store_true", help="add torch.compile of the networks (minutes)")
    add("--json", type=result_file, metavar="FILE", help="write the results there")
    return parser
