"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tim.bench import machine, report, table
from tim.bench.cases import DIRECTIONS, FEW, OPERATIONS, Operation, Size, operations_of
from tim.bench.measure import Rivals, Settings, measure
from tim.bench.parser import Parser, count, counts, result_file, seconds
from tim.bench.report import Row

if TYPE_CHECKING:
    from tim.bench.step import Peers, StepSize

OPERATION_NAMES = tuple(dict.fromkeys(operation.kernel for operation in OPERATIONS))
DTYPES = {machine.name_of(d): d for d in (torch.float32, torch.bfloat16, torch.float16)}
SAMPLING_STEPS = (1, 4, 16)
_DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": tuple(DTYPES)}
_STEP_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}


@dataclass(frozen=True)
class Case:
    """One measurement to make."""

    name: str
    size: str
    dtype: str
    make: Callable[[], Row]


def main(
    arguments: Sequence[str] | None = None,
    peers: Peers | None = None,
    rivals: Rivals | None = None,
) -> int:
    """Measure what the command line asks for; 0, or 1 when a measurement failed.

    `peers` adds other implementations to the comparison of whole steps, `rivals` to that of
    operations.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["launches"]:
        from tim.bench.launch_report import main as count_launches

        return count_launches(arguments[1:], peers)
    if arguments[:1] == ["training"]:
        from tim.bench.training import main as measure_training

        return measure_training(arguments[1:], peers)
    parser = _parser()
    options = parser.parse_args(arguments)
    device = parser.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    kept = device.type == "cpu" and machine.keep_freed_memory()
    try:
        cases = _cases(options, Settings(device, options.seconds, options.compile), peers, rivals)
    except ValueError as error:
        parser.error(str(error))
    with _own_stream(device):
        dtypes = [DTYPES[name] for name in dict.fromkeys(case.dtype for case in cases)]
        run = {
            "command": " ".join(["tim bench", *arguments]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": options.seconds,
            "malloc": "keeps freed memory" if kept else "as it comes",
            "limits": machine.limits(device, dtypes, options.seconds),
            "failures": [],
        }
        facts, rows = machine.describe(device), []
        for number, case in enumerate(cases, start=1):
            print(f"[{number}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
            try:
                rows.append(case.make())
            except Exception as error:
                traceback.print_exc()
                run["failures"].append(f"{case.name}: {type(error).__name__}: {error}")
            if number == len(cases) and device.type == "cuda":
                run["gpu_state_after"] = machine.gpu_state()
            result = report.document(facts, run, rows)
            if options.json:  # each time: a benchmark that is stopped leaves what it has
                report.save(result, options.json)
    table.show(result)
    return 1 if run["failures"] else 0


def _cases(
    options: argparse.Namespace,
    settings: Settings,
    peers: Peers | None,
    rivals: Rivals | None,
) -> list[Case]:
    """All that the options name. ValueError for an unknown name, or when there is nothing."""
    names = list(options.names or (() if options.sampling else OPERATION_NAMES))
    if options.sampling and "sampling" not in names:
        names.append("sampling")
    if "sampling" not in names and (options.steps or options.batches):
        raise ValueError("--steps and --batches are of sampling, which was not asked for")
    cases = [
        case
        for name in names
        for case in (
            _networks(name, options, settings, peers)
            if name in ("step", "derivative")
            else _sampling(options, settings, peers)
            if name == "sampling"
            else _overhead(options, settings)
            if name == "overhead"
            else _operations(name, options, settings, rivals)
        )
    ]
    if not cases:
        there = dict.fromkeys(
            d for name in names for o in operations_of(name) for d in o.directions
        )
        raise ValueError(
            f"--directions of {', '.join(names)} must be among {', '.join(there)}, "
            f"got {','.join(options.directions)!r}"
        )
    if options.sizes:
        known = list(dict.fromkeys(case.size for case in cases))
        for size in options.sizes:
            if size not in known:
                raise ValueError(f"--sizes must be among {', '.join(known)}, got {size!r}")
        cases = [case for case in cases if case.size in options.sizes]
        # In the order that was asked for: a run that is stopped has the first ones.
        cases.sort(key=lambda case: options.sizes.index(case.size))
    return cases


def _operations(
    kernel: str, options: argparse.Namespace, settings: Settings, rivals: Rivals | None
) -> Iterator[Case]:
    kind = settings.device.type
    for operation in operations_of(kernel):
        sizes = operation.sizes(kind, named=bool(options.sizes))
        for size, dtype, direction in itertools.product(
            sizes, options.dtypes or _DEFAULT_DTYPES[kind], operation.directions
        ):
            if direction in options.directions:
                yield _case(operation, size, dtype, direction, settings, rivals)


def _overhead(options: argparse.Namespace, settings: Settings) -> Iterator[Case]:
    """Every operation on so few elements that a call is nothing but its overhead."""
    for operation, dtype in itertools.product(OPERATIONS, options.dtypes or ("float32",)):
        for direction in operation.directions:
            if direction in options.directions:
                yield _case(operation, FEW, dtype, direction, settings)


def _case(
    operation: Operation,
    size: Size,
    dtype: str,
    direction: str,
    settings: Settings,
    rivals: Rivals | None = None,
) -> Case:
    make = functools.partial(measure, operation, size, DTYPES[dtype], direction, settings, rivals)
    return Case(f"{operation.name} {size.name} {dtype} {direction}", size.name, dtype, make)


def _networks(
    name: str, options: argparse.Namespace, settings: Settings, peers: Peers | None
) -> Iterator[Case]:
    """Steps of training, or their derivatives alone."""
    # Imported here: operations can be measured where the model's dependencies are not installed.
    from tim.bench.derivative import DERIVATIVE_SIZES, measure_operator, measure_whole_step
    from tim.bench.step import STEP_SIZES, measure_step

    kind = settings.device.type
    sizes, functions = STEP_SIZES[kind], {name: measure_step}
    if name == "derivative":
        sizes = DERIVATIVE_SIZES[kind]
        functions = {"derivative operator": measure_operator, "derivative step": measure_whole_step}
    for size, dtype, (what, function) in itertools.product(
        sizes, options.dtypes or _STEP_DTYPES[kind], functions.items()
    ):
        make = functools.partial(function, size, DTYPES[dtype], settings, peers)
        yield Case(f"{what} {size.name} {dtype}", size.name, dtype, make)


def _sampling(
    options: argparse.Namespace, settings: Settings, peers: Peers | None
) -> Iterator[Case]:
    """Whole calls of the sampler, by number of steps."""
    from tim.bench.sampling import SamplingBench, sampling_sizes

    # The step counts of a size and dtype come one after the other, and share their candidates.
    bench = functools.lru_cache(maxsize=1)(SamplingBench)
    kind = settings.device.type
    for size, dtype, steps in itertools.product(
        sampling_sizes(kind, options.batches),
        options.dtypes or _STEP_DTYPES[kind],
        options.steps or SAMPLING_STEPS,
    ):

        def make(size: StepSize = size, dtype: str = dtype, steps: int = steps) -> Row:
            return bench(size, DTYPES[dtype], settings, peers).measure(steps)

        yield Case(f"sampling {size.name} {dtype} {steps} steps", size.name, dtype, make)


def _own_stream(device: torch.device) -> AbstractContextManager:
    """A side stream, for CUDA graphs cannot be captured on the default one."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def _listed(choices: Sequence[str] | None = None) -> Callable[[str], tuple[str, ...]]:
    """Parser of names with commas between them."""

    def parse(text: str) -> tuple[str, ...]:
        values = tuple(text.split(","))
        for value in values:
            if choices is not None and value not in choices:
                known = ", ".join(choices)
                raise argparse.ArgumentTypeError(f"must be among {known}, got {value!r}")
        return values

    return parse


def _parser() -> Parser:
    parser = Parser(
        prog="tim bench",
        description="Measure operations and training steps against PyTorch, both in one run.",
    )
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join(OPERATION_NAMES)} (all of these), overhead, step, derivative, sampling, "
        "training or launches",
    )
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--sizes", type=_listed(), metavar="SIZE,...", help="all that the device has")
    add(
        "--dtypes",
        type=_listed(tuple(DTYPES)),
        metavar="DTYPE,...",
        help="float32,bfloat16 and on a GPU float16; steps: float32, on a GPU bfloat16",
    )
    add(
        "--directions",
        type=_listed(DIRECTIONS),
        default=DIRECTIONS,
        metavar="DIRECTION,...",
        help="forward,backward,tangent",
    )
    add(
        "--compile",
        action="store_true",
        help="add torch.compile of the rivals, and of our network when sampling (slow to compile)",
    )
    add("--sampling", action="store_true", help="the same as the name sampling: latency by steps")
    add("--steps", type=counts, metavar="N,...", help="of sampling (1,4,16)")
    add("--batches", type=counts, metavar="N,...", help="images of a sampling call (1 and many)")
    add("--threads", type=count, default=2, help="of a CPU (2)")
    add("--seconds", type=seconds, default=0.4, help="for each function of a comparison (0.4)")
    add("--json", type=result_file, metavar="FILE", help="write the results there")
    return parser
