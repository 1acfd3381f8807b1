"""One run in several processes of this machine (`trainer.devices`), which Lightning joins into a group."""

from __future__ import annotations

import logging
import logging.handlers
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch.multiprocessing as mp
from omegaconf import DictConfig

from tkn.command import one_line
from tkn.interrupt import SIGNALS, Interrupted

#: (configuration, folder) -> the run's summary; called in every process.
Task = Callable[[DictConfig, Path], dict[str, Any]]

_LIGHTNING = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]


def local_rank() -> int | None:
    """Which of a run's processes this is; None if the run has only this one."""
    rank = os.environ.get("LOCAL_RANK")
    return None if rank is None else int(rank)


def run_processes(task: Task, config: DictConfig, folder: Path, count: int) -> dict[str, Any]:
    """Call `task` in `count` new processes; returns the summary of the first.

    Lightning itself would start this process's command line again, which in a sweep is the whole sweep. What the first
    process logs is handled here, and the signals that come here are handed on to all. Raises what the first process to
    fail raised (ValueError, OSError or `Interrupted`; RuntimeError for other errors); the others are stopped then.
    """
    context = mp.get_context("spawn")
    records, outcomes = context.Queue(), context.SimpleQueue()
    listener = logging.handlers.QueueListener(records, _Relay())
    arguments = (task, config, folder, _free_port(), records, outcomes, _LIGHTNING[0].level)
    processes = mp.start_processes(_work, arguments, nprocs=count, join=False, start_method="spawn")
    assert processes is not None
    listener.start()
    failed: Exception | None = None
    with _handed_on(processes.pids()):
        try:
            while not processes.join():
                pass
        except mp.ProcessExitedException as error:
            failed = error
    listener.stop()
    results = []
    while not outcomes.empty():
        results.append(outcomes.get())
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors or failed:
        # What a process that fails leaves to the others is an error of theirs too: the first tells the cause.
        raise errors[0] if errors else RuntimeError(str(failed))
    (summary,) = results
    return summary


def _work(
    rank: int, task: Task, config: DictConfig, folder: Path, port: int, records: Any, outcomes: Any, level: int
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
        summary = task(config, folder)
    except (ValueError, OSError) as error:
        outcomes.put(type(error)(*error.args) if isinstance(error, OSError) else ValueError(str(error)))
    except Interrupted as interrupted:
        outcomes.put(interrupted)
    except Exception as error:
        logging.exception("process %d", rank)
        outcomes.put(RuntimeError(one_line(error)))
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
def _handed_on(pids: list[int]) -> Iterator[None]:
    """Hand SIGINT and SIGTERM on to the processes while the block runs."""

    def hand_on(number: int, _frame: FrameType | None) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    here = threading.current_thread() is threading.main_thread()  # Python allows no handlers in others
    before = {number: signal.signal(number, hand_on) for number in SIGNALS if here}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
