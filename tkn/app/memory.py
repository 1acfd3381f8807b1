"""How the C library holds the memory of a process that trains or times networks."""

from __future__ import annotations

import ctypes
import platform

# Of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next arrays; without effect where there is no glibc.

    glibc gives large arrays back to the system as soon as they are freed. A training step frees all of its activations,
    and the next one would wait for the system to map, and clear, the same pages again. For a command's own processes
    alone: a program that calls `tkn.run` or `bench` may not want its memory held, and can call this itself.
    """
    if platform.libc_ver()[0] == "glibc":
        c_library = ctypes.CDLL(None)
        c_library.mallopt(_M_MMAP_MAX, 0)
        c_library.mallopt(_M_TRIM_THRESHOLD, -1)
