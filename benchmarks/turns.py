"""Processes that time the same things in turns, so that a machine's slow minutes meet all of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from math import comb
from pathlib import Path
from statistics import median


class Side:
    """A process that runs a script with `arguments`, which ends in `serve`."""

    def __init__(self, script: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
        # Elsewhere, because the working folder comes first on the path.
        self.process = subprocess.Popen(
            [sys.executable, str(Path(script).resolve()), *arguments],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names: list[str] = json.loads(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process ended with {self.process.wait()}")
        return line

    def seconds(self, name: str) -> float:
        """The median of one turn."""
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)
        return float(self._read())


def serve(names: list[str], made: Callable[[str], Callable[[], object]], budget: float = 0.4) -> None:
    """Say the names of what is timed, then answer each that is asked for with its median seconds."""
    print(json.dumps(names), flush=True)
    for line in sys.stdin:
        run, times = made(line.strip()), []
        run()
        started = time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - started < budget and len(times) < 4000):
            before = time.perf_counter()
            run()
            times.append(time.perf_counter() - before)
        print(median(times), flush=True)


def interval(values: list[float]) -> tuple[float, float]:
    """Of the median, at least 95 % where there are six values or more, by the signs of the differences; else all."""
    ordered, n = sorted(values), len(values)
    cut = 0
    while 2 * sum(comb(n, k) for k in range(cut + 1)) / 2**n <= 0.05:
        cut += 1
    low = max(0, cut - 1)
    return ordered[low], ordered[n - 1 - low]
