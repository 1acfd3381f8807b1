"""Data sets that a function of the user's makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tkn.app.factory import import_function
from tkn.data.base import DataSet


def load_python(data_dir: Path, *, factory: str, options: dict[str, Any] | None = None) -> DataSet:
    """What the function `factory`, "package.module:function", returns for `data_dir` and the `options` by name.

    ValueError if it is not to be had, or does not return a `DataSet`. Its own errors are its own.
    """
    data = import_function("data.factory", factory)(data_dir, **(options or {}))
    if not isinstance(data, DataSet):
        raise ValueError(f"data.factory={factory} must return a tkn.data.DataSet, not {type(data).__name__}")
    return replace(data, name="python", source=f"own: {factory} ({data.source})")
