"""The processor's name."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name(table: Path = Path("/proc/cpuinfo")) -> str:
    """Such as "Intel(R) Xeon(R) Processor", from Linux's table; without it the architecture, such as "arm64"."""
    try:
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
