"""The paper's data sets by name (Sec. 4.1): one module each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tkn.app.messages import unknown
from tkn.app.options import check_options, option_types
from tkn.data.base import DataSet
from tkn.data.gtsrb import load_gtsrb
from tkn.data.mnist import load_mnist
from tkn.data.pain import load_pain
from tkn.data.pain_synthetic import load_pain_synthetic
from tkn.data.svhn import load_svhn
from tkn.data.tlmnist import load_tlmnist

_LOADERS: dict[str, Callable[..., DataSet]] = {
    "mnist": load_mnist,
    "tlmnist": load_tlmnist,
    "svhn": load_svhn,
    "gtsrb": load_gtsrb,
    "pain": load_pain,
    "pain_synthetic": load_pain_synthetic,
}


def check_data_options(name: str, options: dict[str, Any]) -> None:
    """ValueError if there is no data set `name`, or its loader does not take one of `options`, or not of that type."""
    if name not in _LOADERS:
        raise ValueError(unknown("data", name, _LOADERS))
    check_options("data", name, options, option_types(_LOADERS[name], ("data_dir",)))


def load_data(name: str, data_dir: str | Path, **options: Any) -> DataSet:
    """Load a data set whole into memory from the folder `data_dir`; the options are those of its module's loader.

    FileNotFoundError if it is not there, ValueError for damaged files and impossible options: one line each.
    """
    check_data_options(name, options)
    return _LOADERS[name](Path(data_dir).expanduser(), **options)
