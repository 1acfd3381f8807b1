"""Which engine computes a target layer: what was asked for, or the faster one, measured."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import torch

from tkn.app.files import write_whole
from tkn.backends.cpu.build import available, cache_dir, fingerprint

_log = logging.getLogger(__name__)

#: Above this share of the dense multiply-adds inside the ROIs there is nothing to win by measuring.
MOST_SHARE = 0.9
#: Below this many dense multiply-adds of a batch the calls cost more than the work.
LEAST_WORK = 4_000_000
#: Layers are measured anew when their share of the dense multiply-adds moves into another of so many parts.
_SHARES = 20
_REPEATS = 3


def part_of(share: float) -> int:
    """Which of `_SHARES` equal parts of [0, 1] a share is in."""
    return min(_SHARES - 1, int(share * _SHARES))


class Choices:
    """Seconds measured on this machine, kept in the cache folder so that a repeated run makes the same choices."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] | None = None
        self._faster: dict[tuple[Hashable, ...], bool] = {}

    def faster(
        self,
        key: tuple[Hashable, ...],
        share: float,
        dtype: torch.dtype,
        roi: Callable[[], object],
        dense: Callable[[], object],
    ) -> bool:
        """Whether `roi` is faster than `dense`; each is called a few times if it was not measured before.

        `key`: all that the times depend on, but for the number of threads and `share`, the part of the dense
        multiply-adds inside the ROIs.
        """
        part = part_of(share)
        state = (key, torch.get_num_threads(), part)
        if state not in self._faster:
            if not available(dtype):
                return False
            machine = f"{fingerprint(dtype)} {torch.get_num_threads()} threads {key}"
            dense_seconds = self._get(f"{machine} dense", dense)
            names = [f"{machine} roi {n}/{_SHARES}" for n in range(_SHARES)]
            hopeless = self._hopeless(names, part, dense_seconds)
            self._faster[state] = not hopeless and self._get(names[part], roi) < dense_seconds
        return self._faster[state]

    def _hopeless(self, names: list[str], part: int, dense_seconds: float) -> bool:
        """Whether larger ROIs took so long that these, in proportion, would take twice torch's time.

        Measuring many such states as the ROIs shrink would take longer than some epochs. `names`: of all parts.
        """
        assert self._seconds is not None
        if names[part] in self._seconds:
            return False
        larger = {n: self._seconds[name] for n, name in enumerate(names) if n > part and name in self._seconds}
        return any(seconds * (part + 1) / (n + 1) > 2 * dense_seconds for n, seconds in larger.items())

    def _get(self, key: str, run: Callable[[], object]) -> float:
        if self._seconds is None:
            self._seconds = self._read()
        if key not in self._seconds:
            self._seconds[key] = measure(run)
            _log.debug("measured %s: %.3g s", key, self._seconds[key])
            self._write()
        return self._seconds[key]

    def _read(self) -> dict[str, float]:
        try:
            seconds = json.loads(self._path.read_text(encoding="utf-8"))
            return {str(key): float(value) for key, value in seconds.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}  # none yet, or not readable: measure again

    def _write(self) -> None:
        assert self._seconds is not None
        # What another process measured meanwhile stays.
        self._seconds = {**self._seconds, **self._read()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(self._seconds, indent=1))
        except OSError as error:
            _log.debug("measurements are not kept: %s", error)

    @property
    def _path(self) -> Path:
        return cache_dir() / "engine_seconds.json"


choices = Choices()


def measure(run: Callable[[], object]) -> float:
    """Seconds that `run` takes, the least of a few times."""
    run()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def is_faster(backend: object, work: object) -> bool:
    return work.share < 0.5 and work.macs > LEAST_WORK
