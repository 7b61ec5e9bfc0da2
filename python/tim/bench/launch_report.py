"""`tim bench launches`: kernel launches of a training step, ours and the peers', by phase."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tim.bench import machine, report, table
from tim.bench.launches import count_launches
from tim.bench.parser import Parser, result_file
from tim.bench.step import STEP_SIZES, Peers, Setup, StepSize, own_candidates
from tim.models import ARCHITECTURES

#: A CPU counts what a GPU would launch. That does not depend on batch and width, apart from the
#: optimizer's lists, so the blocks of the large model are narrow here.
_NARROW = replace(ARCHITECTURES["tim-xl2-256"], z_dim=None, hidden_size=144, num_heads=2)
LAUNCH_SIZES = {
    "cpu": (
        *(replace(size, batch=10) for size in STEP_SIZES["cpu"]),
        StepSize("xl2-256, hidden 144", _NARROW, 10),
    ),
    "cuda": STEP_SIZES["cuda"],
}
#: The candidate that the others are compared with.
BASELINE = "public jvp"


@dataclass(frozen=True)
class Count:
    """Launches of one candidate's step."""

    size: str
    candidate: str
    launches: dict[str, Counter[str]]  #: by phase and operation

    @property
    def phases(self) -> dict[str, int]:
        return {phase: counter.total() for phase, counter in self.launches.items()}

    @property
    def total(self) -> int:
        return sum(self.phases.values())


def main(arguments: Sequence[str], peers: Peers | None = None) -> int:
    """Count and print; 0. `peers` adds other implementations."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = parser.device(options.device)
    sizes = [s for s in LAUNCH_SIZES[device.type] if options.size in (None, s.name)]
    if not sizes:
        known = "; ".join(size.name for size in LAUNCH_SIZES[device.type])
        parser.error(f"--size must be one of {known}, got {options.size!r}")
    counts = [count for size in sizes for count in count_size(size, device, peers)]
    phases = list(dict.fromkeys(phase for count in counts for phase in count.phases))
    baselines = {count.size: count.total for count in counts if count.candidate == BASELINE}
    table.show_table(
        ("size", "step", *phases, "launches", f"{BASELINE} / this"),
        [
            (
                count.size, count.candidate, *(str(count.phases.get(phase, 0)) for phase in phases),
                str(count.total), table.factor(_ratio(baselines.get(count.size), count.total)),
            )
            for count in counts
        ],
    )  # fmt: skip
    if options.json:
        report.save(_document(device, arguments, counts), options.json)
    return 0


def count_size(size: StepSize, device: torch.device, peers: Peers | None) -> list[Count]:
    """Counts of all candidates; on a GPU in bfloat16, as training there runs."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    setup = Setup.random(size, dtype, device)
    candidates = own_candidates(setup)
    if peers is not None:
        candidates |= peers.steps(setup, False)
    counts = []
    for name, candidate in candidates.items():
        step = candidate.step()
        step()  # fills caches and creates the optimizer's state
        counts.append(Count(size.name, name, count_launches(step, device)))
    return counts


def _ratio(baseline: int | None, total: int) -> float | None:
    return None if baseline is None else baseline / total


def _document(device: torch.device, arguments: Sequence[str], counts: Sequence[Count]) -> dict:
    run = {
        "command": " ".join(["tim bench launches", *arguments]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    rows = [
        {
            "size": count.size,
            "candidate": count.candidate,
            "total": count.total,
            "launches": {phase: dict(counter) for phase, counter in count.launches.items()},
        }
        for count in counts
    ]
    facts = machine.describe(device)
    return {"schema": report.SCHEMA, "machine": facts, "runs": [run], "launches": rows}


def _parser() -> Parser:
    parser = Parser(prog="tim bench launches", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--size", help="one of the sizes (all)")
    parser.add_argument(
        "--json", type=result_file, metavar="FILE", help="write all counts by operation there"
    )
    return parser
