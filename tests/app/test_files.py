"""Whole files, and folders of one process at a time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tkn.app.files import own_folder, whole_file, write_whole

IN_USE = "is in use: another process runs in it"


@contextmanager
def process_in(folder: Path, then: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that is in `own_folder(folder)` until it is killed."""
    script = (
        "import os, sys, time; from pathlib import Path; from tkn.app.files import own_folder\n"
        f"with own_folder(Path(sys.argv[1])):\n    {then or 'pass'}\n    print('in', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert [file.name for file in tmp_path.iterdir()] == [f".tkn-values-{os.getpid()}.json"]
    assert path.read_text() == "new"
    with pytest.raises(FileNotFoundError, match="gone"), whole_file(path) as temporary:
        temporary.write_bytes((tmp_path / "gone").read_bytes())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "new"


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"values\.json") as full, whole_file(tmp_path / "values.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.errno == errno.ENOSPC


def test_only_the_projects_own_temporary_files_are_cleared_away(tmp_path: Path) -> None:
    """As where the run's folder is the user's home."""
    left = [tmp_path / name for name in (".tkn-last-123.ckpt", ".tkn-config-7.yaml", ".tkn-a-b-1")]
    kept = [tmp_path / name for name in (".zcompdump-host-5.9", ".env-2", ".last-123.ckpt", ".tkn-notes", "a-1.txt")]
    for path in (*left, *kept):
        path.touch()
    (tmp_path / ".tkn-folder-1").mkdir()
    with own_folder(tmp_path):
        assert not any(path.exists() for path in left)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / ".tkn-folder-1"])


def test_the_folder_is_one_processes_at_a_time(tmp_path: Path) -> None:
    with process_in(tmp_path):
        with pytest.raises(ValueError, match=f"{tmp_path.name} {IN_USE}"), own_folder(tmp_path):
            pass
        with own_folder(tmp_path.parent):
            pass
    with own_folder(tmp_path):  # the process was killed, and its lock file is still there
        write_whole(tmp_path / "result", "")
        with pytest.raises(ValueError, match=IN_USE), own_folder(tmp_path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked on POSIX systems only")
def test_a_process_that_was_forked_neither_frees_nor_keeps_the_folder(tmp_path: Path) -> None:
    child = "child = os.fork(); child or (time.sleep(0.2), os._exit(0)); os.waitpid(child, 0)"
    with process_in(tmp_path, child), pytest.raises(ValueError, match=IN_USE), own_folder(tmp_path):
        pass
    orphan = "os.fork() or (os.close(1), time.sleep(5), os._exit(0))"
    with process_in(tmp_path, orphan):
        pass
    with own_folder(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with own_folder(tmp_path), own_folder(tmp_path):
        write_whole(tmp_path / "result", "")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_importing_needs_no_module_of_posix_systems_alone() -> None:
    """Windows has none of them."""
    script = (
        "import sys\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[name] = None\n"
        "import tkn; tkn.TargetConv2d(1, 1, 3)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
