"""Makes the helpers in this folder importable from every test, sub-folders included."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bare", action="store_true",
        help="skip test files that need packages which are not installed, in place of failing",
    )  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """With --bare, on a machine that has little more than torch (benchmarks/gpu_check.sh)."""
    report = yield
    if not report.failed or not collector.config.getoption("--bare"):
        return report
    error = report.call.excinfo.value.__cause__
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        if package != "tim" and not (Path(__file__).parent / f"{package}.py").exists():
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {package} is not installed")
    return report
