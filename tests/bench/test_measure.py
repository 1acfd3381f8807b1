"""Calls are timed in turns, as often and as long as asked, and a failing one alone drops out."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tkn.bench import measure
from tkn.bench.measure import Sampling, summarise, time_interleaved


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that moves when told to: its time in seconds."""
    now = [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(measure, "_quiet", lambda: None)
    return now


def _call(clock: list[float], log: list[str], name: str, seconds: float) -> Callable[[], None]:
    def call() -> None:
        clock[0] += seconds
        log.append(name)

    return call


def test_turns_and_samples(clock: list[float]) -> None:
    log: list[str] = []
    calls = {name: _call(clock, log, name, seconds) for name, seconds in (("fast", 0.25), ("slow", 2.0))}
    timings, failures = time_interleaved(calls, Sampling(rounds=4, repeats=7, seconds=4.0, warmup=0.5), seed=0)
    assert not failures
    # fast: a second a round is more than two calls; slow: two calls a round are more than a second.
    assert (timings["fast"].n, timings["slow"].n) == (16, 8)
    for name, seconds in (("fast", 0.25), ("slow", 2.0)):
        timing = timings[name]
        assert (timing.median, timing.q1, timing.q3, timing.least) == (seconds,) * 4
    turns = [name for name, _ in itertools.groupby(log)]
    assert 2 + 4 <= len(turns) <= 2 + 8
    # One untimed call before each turn's timed ones, and the warm-up.
    assert (log.count("fast"), log.count("slow")) == (3 + 4 * 5, 2 + 4 * 3)
    assert gc.isenabled()


def test_a_failing_call_drops_out_alone(clock: list[float]) -> None:
    log: list[str] = []

    def fails_later() -> None:
        clock[0] += 1
        log.append("bad")
        if log.count("bad") > 3:
            raise MemoryError("no more")

    calls = {"bad": fails_later, "good": _call(clock, log, "good", 1.0)}
    timings, failures = time_interleaved(calls, Sampling(rounds=3, repeats=3, seconds=0, warmup=0), seed=0)
    assert list(timings) == ["good"]
    assert timings["good"].n == 3
    assert str(failures["bad"]) == "no more"


def test_quartiles() -> None:
    timing = summarise([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (timing.n, timing.q1, timing.median, timing.q3, timing.least) == (5, 2.0, 3.0, 4.0, 1.0)
    assert summarise([2.0]).q3 == 2.0
