"""Kills runs: a script, for processes can be forked only where torch has not yet computed.

killing.py random FOLDER: FOLDER/whole in peace, FOLDER/killed with 20 SIGKILLs at random moments.
killing.py writing FOLDER: FOLDER/<n>: a run that kills itself when it has written half of its n-th file, and is run
    again; for every file that a run writes.

The run's overrides come on standard input.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import tkn
from tkn.cli import compose
from tkn.training import run  # noqa: F401  # imported once, before the forks

torch.set_num_threads(1)
OVERRIDES = sys.stdin.read().split()


def _fork(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def _finish(folder: Path, *more: str) -> None:
    _, status = os.waitpid(_fork(lambda: tkn.run(compose(*OVERRIDES, *more), folder)), 0)
    assert status == 0


def _epochs_done(folder: Path) -> int:
    path = folder / "metrics.csv"
    return len(path.read_text().splitlines()) - 1 if path.is_file() else 0


def kill_at_random(folder: Path) -> None:
    more = ("trainer.max_epochs=24", "data.limit=80", "recipe.batch_size=16", "trainer.limit_val_batches=1")
    started = time.monotonic()
    _finish(folder / "whole", *more)
    seconds = time.monotonic() - started
    draw = random.Random(0)
    killed = folder / "killed"
    for kills in range(20):
        pid = _fork(lambda: tkn.run(compose(*OVERRIDES, *more), killed))
        end = time.monotonic() + draw.uniform(0.04, 0.12) * seconds
        # However fast the machine is now, the run must not come to its end before the last kill.
        while time.monotonic() < end and _epochs_done(killed) <= kills + 1:
            time.sleep(0.001)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), f"ended by itself after {kills} kills"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    _finish(killed, *more)
    (folder / "kills").write_text("20")


def kill_while_writing(folder: Path, count: int) -> bool:
    """False if the run writes fewer files."""
    replace = os.replace
    calls = 0

    def deadly(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    def run_deadly() -> None:
        os.replace = deadly
        tkn.run(compose(*OVERRIDES), folder)

    _, status = os.waitpid(_fork(run_deadly), 0)
    if not os.WIFSIGNALED(status):
        assert status == 0
        return False
    assert not (folder / "summary.json").exists()
    _finish(folder)
    return True


if __name__ == "__main__":
    base = Path(sys.argv[2])
    if sys.argv[1] == "random":
        kill_at_random(base)
    else:
        count = 1
        while kill_while_writing(base / str(count), count):
            count += 1
