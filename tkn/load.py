"""How busy others keep the CPUs while something is timed."""

from __future__ import annotations

import os
import time
from pathlib import Path


class OtherLoad:
    """How many CPUs something else kept busy within its contexts: other processes, the hypervisor's other guests."""

    def __init__(self) -> None:
        self._clock = self._others = 0.0
        self._start: tuple[float, float] | None = None

    def __enter__(self) -> None:
        self._start = _clock_and_others()

    def __exit__(self, *_error: object) -> None:
        end = _clock_and_others()
        if self._start is not None and end is not None:
            self._clock += end[0] - self._start[0]
            self._others += end[1] - self._start[1]

    def mean(self) -> float | None:
        """CPUs, on average; None if that is unknown."""
        return round(max(0.0, self._others) / self._clock, 2) if self._clock else None


def _clock_and_others() -> tuple[float, float] | None:
    """Seconds of the clock, and of all CPUs in use by others than this process; None if unknown."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy - time.process_time()
