"""Memory that a process frees and keeps."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from training.runs import TINY

_FAULTS = """
import resource, sys
import numpy as np

def touch():
    array = np.empty(64 << 20, dtype=np.uint8)
    array[::4096] = 1

def faults():
    touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        touch()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""

_FROM_PYTHON = """
import tkn
from tkn.cli import compose

tkn.run(compose(*sys.argv[1:]), "run")
"""

#: The run is over when it is counted: a command ends its process.
_COMMAND = """
from tkn.app.command import CONFIG_DIR, Command

count = 0
def task(config):
    global count
    count = faults()
sys.argv = ["tkn-run"]
Command("tkn-run", CONFIG_DIR).main(lambda: task, lambda: lambda config: None)
print(count)
"""


def _faults(program: str, folder: Path, *arguments: str) -> int:
    """Of four arrays of 64 MiB, one after the other, in a process that has run `program`."""
    command = [sys.executable, "-c", f"{_FAULTS}{program}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what it sets is glibc's")
def test_commands_keep_the_memory_that_they_free_and_other_programs_do_not(tmp_path: Path) -> None:
    # Without transparent huge pages a fault for each of the 16,384 pages of an array.
    assert _faults(_COMMAND, tmp_path) < 50
    arguments = (*TINY, "model=tdn10", "data.limit=32", "trainer.max_epochs=1", f"data_dir={tmp_path}")
    assert _faults(f"{_FROM_PYTHON}\nprint(faults())", tmp_path, *arguments) > 50
