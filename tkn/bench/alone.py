"""Benchmarks take turns, and whoever fills idle time with training pauses for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from tkn.backends.cpu.build import cache_dir

_log = logging.getLogger(__name__)

#: Seconds after which one that waits says so.
_SILENT = 1.0


@contextmanager
def alone() -> Iterator[None]:
    """Keep other benchmarks of this user waiting while the block times something.

    The lock is a file in the cache folder; that of a killed process locks nothing, and where files can't be locked, or
    the folder can't be written, nobody waits.
    """
    lock = _lock()
    with suppress(OSError):
        try:
            lock.acquire(timeout=_SILENT)
        except Timeout:
            _log.warning("another benchmark is timing: waiting for its end")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def benchmark_runs() -> bool:
    """Whether a process of this user is in `alone()` now."""
    lock = _lock()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def _lock() -> FileLock:
    folder = cache_dir()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "benchmark.lock", fallback_to_soft=False)
