"""Timing calls in turns, so that whatever the machine does meanwhile hits all of them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from statistics import quantiles

#: How long to wait for other engines' threads, which go on looking for work, to fall asleep.
_QUIET_SECONDS = 1.0


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: how many were timed, their median, quartiles and least."""

    n: int
    median: float
    q1: float
    q3: float
    least: float


@dataclass(frozen=True)
class Sampling:
    """How calls are timed: in `rounds`, together at least `repeats` calls and `seconds`, after `warmup` seconds."""

    rounds: int
    repeats: int
    seconds: float
    warmup: float


def host_seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    sampling: Sampling,
    seed: int,
    seconds_of: Callable[[Callable[[], object]], float] = host_seconds,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time every call: its warm-up, then one turn a round, in an order that changes from round to round.

    `seconds_of` takes a sample. Each turn starts in quiet, with one call that is not timed. Returns the timings, and
    the errors of calls that failed instead.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    failures: dict[str, Exception] = {}
    order = random.Random(seed)

    def take_turn(name: str, repeats: int, seconds: float) -> list[float]:
        _quiet()
        try:
            calls[name]()
            return _samples(partial(seconds_of, calls[name]), repeats, seconds)
        except Exception as error:
            failures[name] = error
            return []

    for name in calls:
        take_turn(name, 1, sampling.warmup)
    collecting = gc.isenabled()
    gc.disable()  # as timeit: Python's own pauses are nobody's cost
    try:
        for _ in range(sampling.rounds):
            names = [name for name in calls if name not in failures]
            order.shuffle(names)
            for name in names:
                samples[name] += take_turn(
                    name, ceil(sampling.repeats / sampling.rounds), sampling.seconds / sampling.rounds
                )
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(values) for name, values in samples.items() if name not in failures}, failures


def summarise(samples: Sequence[float]) -> Timing:
    """Median and quartiles of at least one sample, in seconds."""
    low, middle, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return Timing(len(samples), middle, low, high, min(samples))


def _samples(sample: Callable[[], float], repeats: int, seconds: float) -> list[float]:
    """At least `repeats` of them, for at least `seconds`."""
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < repeats or time.perf_counter() - start < seconds:
        samples.append(sample())
    return samples


def _quiet() -> None:
    """Wait until this process's threads sleep: a pool may spin for a tenth of a second after its last call."""
    deadline = time.perf_counter() + _QUIET_SECONDS
    while time.perf_counter() < deadline:
        cpu, start = time.process_time(), time.perf_counter()
        time.sleep(0.01)
        if time.process_time() - cpu < 0.05 * (time.perf_counter() - start):
            return
