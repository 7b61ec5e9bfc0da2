"""hypothesis where it is installed; tests of properties are skipped where it is not.

benchmarks/gpu_check.sh runs the tests of the operations with torch, numpy and pytest alone.
"""

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:

    class _Strategies:
        def __getattr__(self, name: str):
            return lambda *arguments, **keywords: self

    st = _Strategies()

    def given(*strategies, **named):
        def skipped(test):
            def without_examples() -> None:
                pytest.skip("hypothesis is not installed")

            without_examples.__name__ = test.__name__
            return without_examples

        return skipped

    def settings(*arguments, **keywords):
        return lambda test: test


__all__ = ["given", "settings", "st"]
