"""The processor's name, and Linux's tables of such things."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name(table: Path = Path("/proc/cpuinfo")) -> str:
    """Such as "Intel(R) Xeon(R) Processor", from Linux's table; without it the architecture, such as "arm64"."""
    return colon_table(table).get("model name") or platform.processor() or platform.machine()


def colon_table(path: Path) -> dict[str, str]:
    """The first value of every key of a file of "key : value" lines; empty if it can't be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    table: dict[str, str] = {}
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            table.setdefault(key.strip(), value.strip())
    return table
