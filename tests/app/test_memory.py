"""Memory that a process frees and keeps."""

from __future__ import annotations

import platform
import subprocess
import sys

_FAULTS = """
import resource, sys
import numpy as np
from tkn.app.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def touch():
    array = np.empty(64 << 20, dtype=np.uint8)
    array[::4096] = 1

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_large_arrays_get_the_same_pages_again() -> None:
    kept, given_back = _faults("keep"), _faults("give back")
    if platform.libc_ver()[0] == "glibc":
        # Without transparent huge pages a fault for each of the 16,384 pages of an array.
        assert kept < 50 < given_back
    else:
        assert kept <= given_back
