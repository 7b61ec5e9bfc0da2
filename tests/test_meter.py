"""Times of a step's parts, on a clock that a test sets."""

import pytest
import torch

from tim import meter


@pytest.fixture
def now(monkeypatch) -> list[float]:
    time = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: time[0])
    return time


def test_phases_follow_each_other_and_spans_lie_beside_them(now: list[float]) -> None:
    clock = meter.Clock(torch.device("cpu"))
    clock.mark("forward")
    now[0] = 1.0
    end = clock.begin("communication")
    now[0] = 3.0
    clock.mark("backward")
    now[0] = 4.0
    other = clock.begin("communication")
    end()
    now[0] = 6.0
    other()
    clock.mark(None)
    now[0] = 9.0
    clock.mark("forward")
    assert clock.read() == {"forward": 3.0, "backward": 3.0, "communication": 5.0}
    assert clock.read() == {}
