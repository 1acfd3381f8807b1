"""The paper's data sets by name (Sec. 4.1): one module each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from tkn.app.messages import unknown
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


_NOT_OPTIONS = ("data_dir", "return")


def check_data_options(name: str, options: dict[str, Any]) -> None:
    """ValueError if there is no data set `name`, or its loader does not take one of `options`, or not of that type."""
    if name not in _LOADERS:
        raise ValueError(unknown("data", name, _LOADERS))
    accepted = {option: hint for option, hint in get_type_hints(_LOADERS[name]).items() if option not in _NOT_OPTIONS}
    for option, value in options.items():
        if option not in accepted:
            raise ValueError(unknown(f"key of data={name}", option, accepted))
        if not _fits(value, accepted[option]):
            hint = accepted[option]
            raise ValueError(f"data.{option}={value!r} must be of type {getattr(hint, '__name__', hint)}")


def _fits(value: object, hint: Any) -> bool:
    """Whether `value` is of a loader's type `hint`: a class, list[class], or a union of these."""
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    # A bool is an int to Python, and an int does for a float.
    return type(value) is hint or (hint is float and type(value) is int)


def load_data(name: str, data_dir: str | Path, **options: Any) -> DataSet:
    """Load a data set whole into memory from the folder `data_dir`; the options are those of its module's loader.

    FileNotFoundError if it is not there, ValueError for damaged files and impossible options: one line each.
    """
    check_data_options(name, options)
    return _LOADERS[name](Path(data_dir).expanduser(), **options)
