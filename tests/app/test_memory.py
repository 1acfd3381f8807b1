"""Memory that a process frees and keeps."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from forked import run_forked
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

#: First as another program would run it, then as the command does, which keeps its memory from then on. The command's
#: run is over when it is counted: a command ends its process.
_PROGRAM = """
import tkn
from tkn.app.command import CONFIG_DIR, Command
from tkn.cli import compose

tkn.run(compose(*sys.argv[1:]), "run")
before = faults()

count = 0
def task(config):
    global count
    count = faults()
sys.argv = ["tkn-run"]
Command("tkn-run", CONFIG_DIR).main(lambda: task, lambda: lambda config: None)
print(before, count)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what it sets is glibc's")
def test_commands_keep_the_memory_that_they_free_and_other_programs_do_not(tmp_path: Path) -> None:
    arguments = (*TINY, "model=tdn10", "data.limit=32", "trainer.max_epochs=1", f"data_dir={tmp_path}")
    done = run_forked(f"{_FAULTS}{_PROGRAM}", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    other, command = map(int, done.stdout.splitlines()[-1].split())
    # Without transparent huge pages a fault for each of the 16,384 pages of an array.
    assert other > 50
    assert command < 50
