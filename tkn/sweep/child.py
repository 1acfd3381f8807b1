"""A run in a process of its own, which stops when it must and pauses when asked."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any, Protocol

from tkn.app.command import one_line
from tkn.app.memory import keep_freed_memory
from tkn.app.signals import Interrupted, interrupt
from tkn.training.run import run

#: Seconds between two looks at the clock and the lock.
_TICK = 0.5
#: A run saves and ends on it as on Ctrl-C's, which a shell's background jobs ignore.
_STOP = signal.SIGTERM


@dataclass(frozen=True)
class Failure:
    """Why a run could not be done, in one line; `missing`: because a file is not there."""

    reason: str
    missing: bool


class Child(Protocol):
    """A process, as `supervise` needs it."""

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after at most so many seconds."""

    def signal(self, number: int) -> None:
        """Send it a signal."""


class RunProcess:
    """`tkn.run` of a configuration, begun in a process and a process group of its own."""

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        # Forked from a process that has imported everything and has touched no GPU, where the system can.
        context: ForkServerContext | SpawnContext
        if "forkserver" in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
        else:
            context = multiprocessing.get_context("spawn")
        self._outcome, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(config, folder, theirs))
        self._process.start()
        theirs.close()

    def wait(self, seconds: float) -> bool:
        self._process.join(seconds)
        return self._process.exitcode is not None

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:  # it has ended, or has no group of its own yet
            if self._process.exitcode is None:
                os.kill(self._process.pid, number)

    def failure(self) -> Failure | None:
        """Of the ended process: what it failed with, None if it finished or was interrupted."""
        try:
            outcome: Failure | None = self._outcome.recv()
        except EOFError:
            return Failure(f"its process ended with status {self._process.exitcode}", missing=False)
        return outcome


def supervise(
    child: Child, stop_at: float, end_at: float, clock: Callable[[], float], must_pause: Callable[[], bool]
) -> None:
    """Wait for the child's end; it is interrupted at `stop_at` of the clock, and killed at `end_at`.

    While `must_pause()` it stands still. Interrupted with it if this process is.
    """
    paused = False
    interrupted = False
    try:
        while not child.wait(_TICK):
            now = clock()
            stopping = now >= stop_at
            if (must_pause() and not stopping) != paused:
                paused = not paused
                child.signal(signal.SIGSTOP if paused else signal.SIGCONT)
            if stopping and not interrupted:
                interrupted = True
                child.signal(_STOP)
            if now >= end_at:
                child.signal(signal.SIGKILL)
    except (KeyboardInterrupt, Interrupted):
        child.signal(_STOP)
        child.signal(signal.SIGCONT)
        while not child.wait(_TICK):
            pass
        raise


def _run(config: Mapping[str, Any], folder: Path, outcome: Connection) -> None:
    signal.signal(_STOP, interrupt)  # before and after the run has handlers of its own
    os.setpgid(0, 0)  # Ctrl-C in a terminal goes to the parent alone, which hands it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    keep_freed_memory()
    failure = None
    try:
        run(config, folder)
    except Interrupted:
        pass
    except Exception as error:
        failure = Failure(one_line(error), isinstance(error, FileNotFoundError))
    outcome.send(failure)
    sys.exit(failure is not None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), _STOP)
