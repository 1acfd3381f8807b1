"""One run in several processes of this machine (`trainer.devices`), which Lightning joins into a group."""

from __future__ import annotations

import logging
import logging.handlers
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch.multiprocessing as mp
from omegaconf import DictConfig

from tkn.app.command import one_line
from tkn.app.signals import SIGNALS, Interrupted

#: (configuration, folder, which of the processes this is) -> the run's summary; called in every process.
ProcessRun = Callable[[DictConfig, Path, int], dict[str, Any]]

_LIGHTNING = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
_TORCH = logging.getLogger("torch.multiprocessing.spawn")


def run_processes(task: ProcessRun, config: DictConfig, folder: Path, count: int) -> dict[str, Any]:
    """Call `task` in `count` new processes; returns the summary of the first.

    What the first process logs is handled here, and the signals that come here are handed on to all. Raises what the
    first process to fail raised (ValueError, OSError; ChildProcessError for other errors), when the others have been
    stopped; and `Interrupted` if a signal came.

    Lightning itself, and torchrun, would start this process's command line again, which in a sweep is the whole sweep.
    torchrun's function elastic_launch kills processes that go on for 30 seconds after a signal, be it in a long step or
    while they save, and hands over neither the errors nor what is logged.
    """
    context = mp.get_context("spawn")
    records, outcomes = context.Queue(), context.SimpleQueue()
    listener = logging.handlers.QueueListener(records, _Relay())
    arguments = (task, config, folder, _free_port(), records, outcomes, _LIGHTNING[0].level)
    _TORCH.setLevel(logging.ERROR)  # that it stops the other processes
    # The processes begin without signals, until they can answer them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        processes = mp.start_processes(_work, arguments, nprocs=count, join=False, start_method="spawn")
        assert processes is not None
        listener.start()
        failed: mp.ProcessExitedException | None = None
        with _handed_on(processes.pids()) as received:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            try:
                while not processes.join():
                    pass
            except mp.ProcessExitedException as error:
                failed = error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    listener.stop()
    results = []
    while not outcomes.empty():
        results.append(outcomes.get())
    return _outcome(results, failed, received)


def _outcome(results: list[Any], failed: mp.ProcessExitedException | None, received: list[int]) -> dict[str, Any]:
    """The summary among what the processes came to; else raises the reason why there is none."""
    for result in results:
        if failed is None and isinstance(result, dict):
            return result
    if received:
        raise Interrupted(received[0])
    # The processes that are stopped when one has failed are interrupted too.
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
        raise errors[0]
    raise ChildProcessError(str(failed))


def _work(
    rank: int, task: ProcessRun, config: DictConfig, folder: Path, port: int, records: Any, outcomes: Any, level: int
) -> None:
    # Ctrl-C in a terminal goes to all processes of its group: here it should come once, from the first process.
    os.setsid()
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for logger in _LIGHTNING:
        logger.setLevel(level)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(logging.handlers.QueueHandler(records) if rank == 0 else logging.NullHandler())
    try:
        summary = task(config, folder, rank)
    except Interrupted:
        pass
    except ValueError as error:
        outcomes.put(ValueError(str(error)))
    except OSError as error:
        outcomes.put(error)
    except Exception as error:
        failure = ChildProcessError(one_line(error))
        failure.add_note(traceback.format_exc())
        outcomes.put(failure)
    else:
        if rank == 0:
            outcomes.put(summary)
        return
    sys.exit(1)


class _Relay(logging.Handler):
    """Handles another process's records as if they came from here."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _handed_on(pids: list[int]) -> Iterator[list[int]]:
    """Hand SIGINT and SIGTERM on to the processes while the block runs; yields a list of those that came."""
    received: list[int] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    here = threading.current_thread() is threading.main_thread()  # Python allows no handlers in others
    before = {number: signal.signal(number, hand_on) for number in SIGNALS if here}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
