"""The arithmetic of times, with a clock that the tests move."""

import gc

import pytest
import torch

from tim.bench import timing
from tim.bench.timing import MAX_ROUNDS, MIN_ROUNDS, Times, compare

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Seconds since the start; nothing else moves time."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: Clock.now)
    return Clock


def taking(clock, *durations: float):
    """A function whose calls last as long as the durations say, again and again."""
    calls = []

    def function() -> None:
        clock.now += durations[len(calls) % len(durations)]
        calls.append(clock.now)

    return function, calls


def test_times_keep_median_minimum_and_quartiles() -> None:
    times = Times.of([5.0, 1.0, 2.0, 4.0, 3.0], calls_per_sample=7, method="loop")
    assert (times.median, times.minimum) == (3.0, 1.0)
    assert (times.lower_quartile, times.upper_quartile) == (2.0, 4.0)
    assert times.spread == pytest.approx(2 / 3)
    assert (times.samples, times.calls_per_sample, times.method) == (5, 7, "loop")


def test_compare_gives_seconds_per_call(clock) -> None:
    slow, fast = taking(clock, 0.02)[0], taking(clock, 1e-5)[0]
    times = compare({"slow": [slow], "fast": [fast]}, CPU, seconds=1.0)
    assert times["slow"].median == pytest.approx(0.02)
    assert times["fast"].median == pytest.approx(1e-5)
    assert times["slow"].calls_per_sample == 1
    assert times["fast"].calls_per_sample * 1e-5 >= timing.SAMPLE_SECONDS["cpu"]


def test_several_sets_of_buffers_count_as_several_calls(clock) -> None:
    first, second = taking(clock, 0.01)[0], taking(clock, 0.03)[0]
    times = compare({"both": [first, second]}, CPU, seconds=0.1)
    assert times["both"].median == pytest.approx(0.02)
    assert times["both"].calls_per_sample == 2


def test_rounds_take_turns_and_do_not_always_begin_with_the_same(clock) -> None:
    order = []

    def function(name: str):
        def call() -> None:
            clock.now += 0.01
            order.append(name)

        return [call]

    compare({name: function(name) for name in "abc"}, CPU, seconds=1e-9)
    rounds = "".join(order[-3 * MIN_ROUNDS :])
    assert rounds == "abcbcacababcbca"


def test_rounds_end_with_the_time_and_at_the_limit(clock) -> None:
    function = taking(clock, 0.01)[0]
    assert compare({"f": [function]}, CPU, seconds=0.0)["f"].samples == MIN_ROUNDS
    assert compare({"f": [function]}, CPU, seconds=0.1)["f"].samples in (10, 11)
    assert compare({"f": [function]}, CPU, seconds=1e9)["f"].samples == MAX_ROUNDS


def test_one_slow_sample_moves_the_median_of_neither(clock) -> None:
    disturbed = taking(clock, *[0.01] * 4, 5.0)[0]
    times = compare({"f": [disturbed]}, CPU, seconds=0.0)["f"]
    assert times.median == pytest.approx(0.01)
    assert times.upper_quartile == pytest.approx(0.01)


def test_garbage_collection_is_off_while_timing_and_back_after(clock) -> None:
    states = []

    def call() -> None:
        clock.now += 0.01
        states.append(gc.isenabled())

    assert gc.isenabled()
    compare({"f": [call]}, CPU, seconds=0.0)
    assert gc.isenabled()
    assert not any(states[-MIN_ROUNDS:])


def test_a_call_that_holds_much_of_a_gpu_is_timed_from_the_host(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 64000))
    monkeypatch.setattr(timing, "GraphSampler", lambda calls: "graph")
    made = []
    for peak in (2000, 2001):
        monkeypatch.setattr(timing, "peak_bytes", lambda call, device, peak=peak: peak)
        made.append(timing._sampler([lambda: None], torch.device("cuda"), True))
    assert made[0] == "graph"
    assert made[1].method == "loop" and made[1].settle


def test_a_sampler_that_settles_calls_once_before_the_clock_runs(clock) -> None:
    function, _ = taking(clock, 9.0, 9.0, 0.5, 0.5)
    sampler = timing.LoopSampler([function], CPU, settle=True)
    assert sampler.sample(2) == pytest.approx(1.0)
