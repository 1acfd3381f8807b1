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
from contextlib import ExitStack
from pathlib import Path

from hydra.errors import HydraException

from tkn.app.files import locked
from tkn.app.plain_command import positive, run_plain
from tkn.app.signals import interrupt
from tkn.bench.alone import benchmark_runs
from tkn.sweep.child import Failure, RunProcess, supervise
from tkn.sweep.rows import Row, find_rows
from tkn.sweep.turns import CLAIM, Turn, Turns

_NAME = "tkn.sweep.fill"
#: Seconds, and a part of all there are, that a run has to save itself before the end: the smaller of both.
_TO_SAVE = (20.0, 0.2)
#: Seconds between two looks at what another process does.
_TICK = 1.0


def fill(
    rows: Sequence[Row],
    results: Path,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    seeds: int | None = None,
) -> None:
    """Do runs of the rows in results/<experiment>/ until so many seconds of the clock are over.

    A run that can't be done is named, and another of its row tried; after two of them the row is left. Of one
    whose data are not there all rows of these data are left. `seeds`: how many of a row are enough, with all
    their folds.
    """
    end_at = clock() + seconds
    stop_at = end_at - min(_TO_SAVE[0], _TO_SAVE[1] * seconds)
    turns = Turns(rows, results, seeds)
    while clock() < stop_at:
        turn = turns.next()
        if turn is None:
            if not turns.others_run():
                break
            time.sleep(_TICK)
            continue
        failure = (
            Failure(turn.obstacle, missing=False)
            if turn.obstacle
            else _do(turn, turns.folder(turn), results, clock, (stop_at, end_at))
        )
        if failure is not None:
            lost = turns.fail(turn, failure.missing)
            names = ", ".join(row.experiment for row in lost) or str(turns.folder(turn))
            print(f"{_NAME}: left: {names}: {failure.reason}", file=sys.stderr, flush=True)


def _do(
    turn: Turn, folder: Path, results: Path, clock: Callable[[], float], ends: tuple[float, float]
) -> Failure | None:
    """Why a run failed, if it did. One that another process has begun meanwhile is left to that."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as claim:
        try:
            claim.enter_context(locked(folder / CLAIM))
        except ValueError:
            return None
        print(f"{_NAME}: {folder}: tkn-run {' '.join(turn.row.run(turn.number))}", flush=True)
        child = RunProcess(turn.row.configuration(turn.number, results), folder)
        supervise(child, *ends, clock, benchmark_runs)
        failure = child.failure()
    if failure is not None and not any(folder.iterdir()):
        folder.rmdir()
    return failure


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 1 and one line on stderr for a wrong argument (130 on Ctrl-C)."""
    signal.signal(signal.SIGTERM, interrupt)
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, overrides = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parsed = _parser().parse_args(own)

    def work() -> int:
        fill(find_rows(parsed.experiments, overrides), parsed.results, parsed.seconds, seeds=parsed.seeds)
        return 0

    run_plain(_NAME, work, HydraException)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_NAME}",
        description="Run the experiments with the fewest finished seeds first, the cheapest first of these.",
        epilog="after --: overrides of tkn-run, for all runs",
    )
    parser.add_argument("results", type=Path, help="the folder of results/<experiment>/seed<N>, and fold<F>seed<N>")
    parser.add_argument("--seconds", type=_seconds, required=True, help="how long, all in all")
    parser.add_argument("--seeds", type=positive, metavar="N", help="how many of a row are enough (without an end)")
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
