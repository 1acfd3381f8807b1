"""Whether this machine's kernels run plans rightly: tried in a process of its own, for a wrong build may crash it."""

from __future__ import annotations

import threading
import warnings
from contextlib import suppress

import torch

from tkn.backends.cpu.build import folder, run_in_child


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
