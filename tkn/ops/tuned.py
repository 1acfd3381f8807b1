"""What `tkn.tune` found out: for a sequence of layers on a batch, which of them to compute inside their ROIs."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tkn.app.files import write_whole
from tkn.backends.cpu.build import cache_dir, fingerprint
from tkn.work import Work

#: Shares of the dense multiply-adds in the same of so many parts count as one.
_PARTS = 20

_lock = threading.Lock()
_tables: dict[Path, dict[str, list[bool]]] = {}
#: One entry each time that choices were kept.
_kept: list[int] = []


def key_of(works: Sequence[Work]) -> str:
    """What a choice is kept under: the layers and the batch, and about how large their ROIs are."""
    rounded = (replace(work, live=1.0, share=min(_PARTS - 1, int(work.share * _PARTS)) / _PARTS) for work in works)
    return "; ".join(str(work) for work in rounded)


def found(works: Sequence[Work]) -> list[bool] | None:
    """Whether each layer is better computed inside its ROIs; None if that was not measured."""
    table = _table()
    return table.get(key_of(works)) if table else None


def count() -> int:
    """How often choices were kept: what was derived from them before is out of date."""
    return len(_kept)


def keep(choices: dict[str, list[bool]]) -> None:
    """Keep choices by key, in this process and, where the cache folder can be written, on the machine."""
    table = _table()
    with _lock:
        _kept.append(len(choices))
        # What another process kept meanwhile stays.
        table |= {**_read(_path()), **choices}
        try:
            _path().parent.mkdir(parents=True, exist_ok=True)
            write_whole(_path(), json.dumps(table, indent=1))
        except OSError:
            pass  # a folder that can't be written: this process knows


def _path() -> Path:
    # Of these kernels: others have other times.
    return cache_dir() / f"tuned_{fingerprint(torch.float32)}.json"


def _table() -> dict[str, list[bool]]:
    path = _path()
    with _lock:
        if path not in _tables:
            _tables[path] = _read(path)
        return _tables[path]


def _read(path: Path) -> dict[str, list[bool]]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): [bool(flag) for flag in flags] for key, flags in table.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # none yet, or damaged: measured again when it is asked for
