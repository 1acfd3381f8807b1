"""What a benchmark ran on. Linux tells most; elsewhere the unknown is left out."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from tkn.app.processor import colon_table, processor_name

#: Of the CPU's flags those that decide which kernels an engine can use (with x86's names, then Arm's).
_FLAGS = ("avx2", "fma", "f16c", "avx512", "avx_vnni", "avx10", "amx", "asimd", "sve", "bf16", "i8mm")


def describe_machine() -> dict[str, Any]:
    """The CPU, its cores, caches and relevant flags, the memory and the operating system."""
    cpu = colon_table(Path("/proc/cpuinfo"))
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    memory = colon_table(Path("/proc/meminfo")).get("MemTotal", "")
    return {
        "cpu": processor_name(),
        "architecture": platform.machine(),
        "flags": [flag for flag in flags if flag.startswith(_FLAGS) or flag.endswith("bf16")],
        "logical_cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cores_per_socket": int(cpu["cpu cores"]) if "cpu cores" in cpu else None,
        "caches": _caches(),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "system": platform.platform(),
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """What computes: "cpu", or a GPU's name, memory and compute capability, with CUDA's version."""
    if device.type == "cpu":
        return {"name": "cpu"}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
    }


def load_average() -> float | None:
    """Processes that ran or waited, over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _caches() -> dict[str, str]:
    """Sizes of the first CPU's caches, such as {"L1 data": "32K"}."""
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        caches[f"L{level} {kind.lower()}"] = size
    return caches
