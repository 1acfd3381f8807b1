"""Data sets by name: the paper's (Sec. 4.1), a module each, and a user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from tkn.app.messages import unknown
from tkn.app.options import check_options, option_types
from tkn.data.base import DataSet, Split
from tkn.data.faces import load_faces
from tkn.data.folder import load_folder
from tkn.data.gtsrb import load_gtsrb
from tkn.data.mnist import load_mnist
from tkn.data.mnist_moved import load_mnist_moved
from tkn.data.pain import load_pain
from tkn.data.pain_synthetic import load_pain_synthetic
from tkn.data.preparation import Preparation
from tkn.data.python import load_python
from tkn.data.svhn import load_svhn
from tkn.data.tlmnist import load_tlmnist

__all__ = [
    "HOW_READ",
    "DataSet",
    "Preparation",
    "Split",
    "check_data_options",
    "load_data",
    "loader_options",
    "without_how_read",
]

_LOADERS: dict[str, Callable[..., DataSet]] = {
    "mnist": load_mnist,
    "tlmnist": load_tlmnist,
    "mnist_moved": load_mnist_moved,
    "svhn": load_svhn,
    "gtsrb": load_gtsrb,
    "pain": load_pain,
    "pain_synthetic": load_pain_synthetic,
    "folder": load_folder,
    "faces": load_faces,
    "python": load_python,
}

#: Options of own data that say how they are read, and change no result.
HOW_READ = ("memory", "workers")


#: Keys of a configuration's group `data` that no loader takes.
_NOT_LOADERS = ("name", "limit", "validation")


def loader_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a loader takes of a configuration's group `data`."""
    return {key: value for key, value in group.items() if key not in _NOT_LOADERS}


def without_how_read(options: Mapping[str, Any]) -> dict[str, Any]:
    """The group `data` of a configuration, with what can change a result alone."""
    return {key: value for key, value in options.items() if key not in HOW_READ}


def check_data_options(name: str, options: dict[str, Any]) -> None:
    """ValueError if there is no data set `name`, or its loader does not take one of `options`, or not of that type."""
    if name not in _LOADERS:
        raise ValueError(unknown("data", name, _LOADERS))
    check_options("data", name, options, option_types(_LOADERS[name], ("data_dir",)))


def load_data(name: str, data_dir: str | Path, **options: Any) -> DataSet:
    """Load a data set from the folder `data_dir`, or from the one in its options, which are those of its loader.

    FileNotFoundError if it is not there, ValueError for damaged files and impossible options: one line each.
    """
    check_data_options(name, options)
    types = option_types(_LOADERS[name], ("data_dir",))
    made = {
        key: types[key](**value) if is_dataclass(types[key]) and isinstance(value, dict) else value
        for key, value in options.items()
    }
    return _LOADERS[name](Path(data_dir).expanduser(), **made)
