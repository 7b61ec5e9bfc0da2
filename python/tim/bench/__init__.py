"""Benchmarks of the operations and of the training step: `tim bench`, `benchmarks/bench_*.py`.

Everything that a figure is compared with is measured in the same run, in turns with it; see
docs/benchmarks.md for the method. Nothing here is imported by the rest of the package.
"""

from tim.bench.command import main

__all__ = ["main"]
