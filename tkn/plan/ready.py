"""Whether this machine's kernels run plans rightly: tried in a process of its own, for a wrong build may crash it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import torch

import tkn
from tkn.backends.cpu.build import cache_dir, fingerprint

_SECONDS = 300


class _Trial:
    """Of this machine's build of the kernels: made once, and its success kept beside them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._passed: bool | None = None

    def passed(self) -> bool:
        with self._lock:
            if self._passed is None:
                self._passed = self._made()
            return self._passed

    def skip(self) -> None:
        self._passed = True

    def _made(self) -> bool:
        mark = folder(torch.float32) / "plans_checked"
        if mark.is_file():
            return True
        wrong = run_in_child("tkn.plan.check")
        if wrong is not None:
            warnings.warn(f"torch runs plans (same results, slower): the kernels fail: {wrong}", stacklevel=2)
            return False
        with suppress(OSError):  # in a folder that can't be written, the next process tries again
            mark.touch()
        return True


_trial = _Trial()


def plans_run() -> bool:
    """Whether the kernels, which are there, may run plans in this process.

    Each build of them is tried once on a machine, before its first plan; warns, once in a process, if that fails.
    """
    return _trial.passed()


def trust() -> None:
    """Let plans run in this process without trying the kernels: it is the one that tries them."""
    _trial.skip()


# Stand-ins for what tkn.backends.cpu.build will offer.


def folder(dtype: torch.dtype) -> Path:
    """Where the kernels for `dtype` are kept."""
    real = {torch.float32: "float", torch.float64: "double"}[dtype]
    return cache_dir() / f"tkn_engine_{real}_{fingerprint(dtype)}"


def run_in_child(module: str, *arguments: str) -> str | None:
    """Run a module as a program in a process of its own; None if it ends well, else what went wrong."""
    source = str(Path(tkn.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))}
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"the trial ended by signal {-done.returncode}"
    return (done.stderr.strip().splitlines() or [f"the trial ended with {done.returncode}"])[-1]
