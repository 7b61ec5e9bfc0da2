"""Result files and tables.

A result file holds one document: {"schema", "machine", "runs", "rows"}. A run is one call of a
benchmark with its date, settings and the limits it measured; each row names its run by index.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tim.bench.timing import Times

SCHEMA = 1


@dataclass(frozen=True)
class Candidate:
    """One way of computing the same thing."""

    times: Times
    peak_bytes: int  #: see `tim.bench.memory`
    error: float  #: relative to float64


@dataclass(frozen=True)
class Row:
    """Candidates measured in turns; the first is the one that the row is about."""

    benchmark: str  #: an operation, "step" or "sampling"
    size: str
    shape: dict
    dtype: str
    direction: str
    device: str
    runs_on: str  #: "cpu kernel", "cuda kernel", or "PyTorch: " and why no kernel does
    candidates: dict[str, Candidate]
    copy: Times | None = None  #: of a copy of traffic_bytes, measured in the same turns
    traffic_bytes: int | None = None
    flops: float | None = None
    buffer_sets: int = 1
    residence: str | None = None  #: smallest cache that all sets of buffers fit in, or "memory"
    notes: list[str] = field(default_factory=list)

    @property
    def subject(self) -> Candidate:
        return next(iter(self.candidates.values()))

    def speedup(self, rival: str) -> float | None:
        """Median time of the rival over that of the subject; None where it was not measured."""
        if rival not in self.candidates:
            return None
        return self.candidates[rival].times.median / self.subject.times.median

    @property
    def speedups(self) -> dict[str, float]:
        """Of the subject over every other candidate."""
        _, *rivals = self.candidates
        return {name: self.speedup(name) for name in rivals}

    @property
    def copy_share(self) -> float | None:
        """Attained bandwidth over that of a copy of as many bytes: 1 is as fast as copying."""
        return None if self.copy is None else self.copy.median / self.subject.times.median

    @property
    def bytes_per_second(self) -> float | None:
        return self.traffic_bytes and self.traffic_bytes / self.subject.times.median

    @property
    def flops_per_second(self) -> float | None:
        return self.flops and self.flops / self.subject.times.median

    def as_dict(self, run: int) -> dict:
        """Everything of the row and what follows from it, for a result file."""
        derived = ("speedups", "copy_share", "bytes_per_second", "flops_per_second")
        return {"run": run, **asdict(self), **{name: getattr(self, name) for name in derived}}


def document(machine: dict, run: dict, rows: Iterable[Row]) -> dict:
    """The document of one run."""
    return {
        "schema": SCHEMA,
        "machine": machine,
        "runs": [run],
        "rows": [row.as_dict(0) for row in rows],
    }


def merge(documents: Sequence[dict]) -> dict:
    """One document of several from the same machine.

    Raises ValueError when there are none, or their machines or schemas differ.
    """
    if not documents:
        raise ValueError("nothing to merge: no result files")
    first = documents[0]
    runs, rows = [], []
    for other in documents:
        if _identity(other) != _identity(first):
            raise ValueError(
                f"result files must come from one machine, got {_identity(first)} "
                f"and {_identity(other)}"
            )
        rows += [{**row, "run": row["run"] + len(runs)} for row in other["rows"]]
        runs += other["runs"]
    return {"schema": SCHEMA, "machine": first["machine"], "runs": runs, "rows": rows}


def _identity(result: dict) -> tuple:
    return result["schema"], result["machine"]["device"], result["machine"]["name"]


def save(result: dict, path: str | Path) -> None:
    """Write a result document; what was there is replaced at once."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
