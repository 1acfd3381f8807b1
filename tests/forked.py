"""Python in processes of its own, which begin with torch, Lightning and this package imported: that takes seconds.

They are forked from a process that has imported these and done nothing else, so what they do is what a new `python -c`
would do, but for functions registered with atexit, which they do not call.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tkn.cli", "tkn.sweep.objectives", "tkn.training.config", "tkn.bench.run"])

TKN_RUN = "from tkn.cli import main; main()"
TKN_BENCH = "from tkn.bench.cli import main; main()"


class ForkedPython:
    """`python -c code arguments` in `folder`, with these variables beside the environment's; as `subprocess.Popen`."""

    def __init__(self, code: str, *arguments: str, folder: Path | None = None, **environment: str) -> None:
        output = Path(tempfile.mkdtemp(prefix="tkn-test-"))
        weakref.finalize(self, shutil.rmtree, output)
        self._files = (output / "stdout", output / "stderr")
        started = (code, arguments, folder or Path.cwd(), {**os.environ, **environment}, self._files)
        self._process = _CONTEXT.Process(target=_python, args=started)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end: (what it wrote to stdout, and to stderr)."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError
        output, errors = (path.read_text() for path in self._files)
        return output, errors


def run_forked(
    code: str, *arguments: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of `python -c code arguments`."""
    process = ForkedPython(code, *arguments, folder=folder, **environment)
    output, errors = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def _python(
    code: str, arguments: tuple[str, ...], folder: Path, environment: dict[str, str], files: tuple[Path, ...]
) -> None:
    for number, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    sys.path[0] = ""
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
