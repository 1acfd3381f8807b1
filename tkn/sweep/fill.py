"""Runs what a folder of results lacks most, for so many seconds:

    python -m tkn.sweep.fill results --seconds 500 -- trainer.precision=bf16-mixed

docs/sweeps.md explains it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.errors import HydraException

from tkn.app.plain_command import run_plain
from tkn.app.signals import interrupt
from tkn.bench.alone import benchmark_runs
from tkn.sweep.child import RunProcess, supervise
from tkn.sweep.rows import Row, find_rows, next_run

_NAME = "tkn.sweep.fill"
#: Seconds, and a part of all there are, that a run has to save itself before the end: the smaller of both.
_TO_SAVE = (20.0, 0.2)


def fill(rows: Sequence[Row], results: Path, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Do runs of the rows in results/<experiment>/seed<N> until so many seconds of the clock are over.

    A run that can't be done is named, and another seed of its row tried; after two of them the row is left. Of one
    whose data are not there all rows of these data are left.
    """
    end_at = clock() + seconds
    stop_at = end_at - min(_TO_SAVE[0], _TO_SAVE[1] * seconds)
    left = list(rows)
    failed: set[Path] = set()
    while clock() < stop_at and (chosen := next_run(left, results, failed)) is not None:
        row, seed = chosen
        folder = results / row.experiment / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{_NAME}: {folder}: tkn-run {' '.join(row.run(seed))}", flush=True)
        child = RunProcess(row.run(seed), folder)
        supervise(child, stop_at, end_at, clock, benchmark_runs)
        failure = child.failure()
        if failure is None:
            continue
        failed.add(folder)
        twice = sum(other.parent == folder.parent for other in failed) > 1
        lost = [other for other in left if (other is row and twice) or (failure.missing and other.data == row.data)]
        left = [other for other in left if other not in lost]
        names = ", ".join(other.experiment for other in lost) or str(folder)
        print(f"{_NAME}: left: {names}: {failure.reason}", file=sys.stderr, flush=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 1 and one line on stderr for a wrong argument (130 on Ctrl-C)."""
    signal.signal(signal.SIGTERM, interrupt)
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, overrides = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parsed = _parser().parse_args(own)

    def work() -> int:
        fill(find_rows(parsed.experiments, overrides), parsed.results, parsed.seconds)
        return 0

    run_plain(_NAME, work, HydraException)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_NAME}",
        description="Run the experiments with the fewest finished seeds first, the cheapest first of these.",
        epilog="after --: overrides of tkn-run, for all runs",
    )
    parser.add_argument("results", type=Path, help="the folder of results/<experiment>/seed<N>")
    parser.add_argument("--seconds", type=_seconds, required=True, help="how long, all in all")
    parser.add_argument("--experiments", default="table*", metavar="GLOB", help="which, of conf/experiment (table*)")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


if __name__ == "__main__":
    main()
