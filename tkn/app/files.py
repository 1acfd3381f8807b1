"""Files are written whole: under a temporary name beside the final one, then renamed."""

from __future__ import annotations

import csv
import errno
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

#: What the project's temporary files begin with: no other program's do.
_PREFIX = ".tkn-"
#: As `whole_file` makes them; not the lock.
_TEMPORARY = re.compile(re.escape(_PREFIX) + r".+-\d+(\.\w+)?")
_LOCK = f"{_PREFIX}lock"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it becomes `path` if the block succeeds, and is removed if not.

    The temporary name keeps the suffix, from which some libraries tell a format. OSError that names `path` if it cannot
    be written, as on a full disk.
    """
    temporary = path.with_name(f"{_PREFIX}{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        # The system names no file with these.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV under a header of all their keys, in the order in which they first come."""
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out of the block for the same lock file, which is gone at the block's end.

    ValueError, at once, if another one is in it. File systems without locks keep nobody out; the file of a killed
    process locks nothing.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{path.parent} is in use: another process runs in it") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        # While it is locked: one that has opened it meanwhile sees that it is gone. Windows removes no open file.
        with suppress(OSError):
            path.unlink()
        lock.release()


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Keep other processes out of the block for the same folder (see `locked`), and clear away what killed ones had
    half written.
    """
    with locked(folder / _LOCK):
        for path in folder.glob(f"{_PREFIX}*"):
            if path.is_file() and _TEMPORARY.fullmatch(path.name):
                path.unlink()
        yield


def in_use(folder: Path, lock: str = _LOCK) -> bool:
    """Whether another process is in `own_folder` of it now, or in `locked` by this name in it."""
    if not (folder / lock).is_file():
        return False
    try:
        with locked(folder / lock):
            return False
    except ValueError:
        return True
