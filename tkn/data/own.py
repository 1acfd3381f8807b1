"""What loaders of a user's own images share: their options' checks, the order of the samples, the source's words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tkn.app.messages import unknown
from tkn.data.partition import Division, Labels, mixed_order
from tkn.data.preparation import IMAGENET

#: Smaller images leave a network's last layers nothing.
MIN_SIDE = 8
#: `data.normalise`: mean and deviation of each channel.
NORMALISATIONS = {"imagenet": IMAGENET}


def find_folder(path: str) -> Path:
    """The folder `data.path`; FileNotFoundError if it is not there."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path={path} is not a folder")
    return folder


def check_size(size: int | list[int]) -> tuple[int, int]:
    """`data.size`, a side or [height, width], as (height, width); ValueError for what can't be."""
    sides = [size, size] if isinstance(size, int) else size
    if len(sides) != 2 or min(sides) < MIN_SIDE:
        raise ValueError(f"data.size={size} must be one side or [height, width], each at least {MIN_SIDE} pixels")
    return sides[0], sides[1]


def normalisation(name: str | None, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | tuple[None, None]:
    """Mean and deviation of each channel by the name in `data.normalise`; ValueError for what can't be."""
    if name is None:
        return None, None
    if name not in NORMALISATIONS:
        raise ValueError(unknown("data.normalise", name, NORMALISATIONS))
    if channels != 3:
        raise ValueError(f"data.normalise={name} is for three channels: give data.channels=3, also for grey images")
    return NORMALISATIONS[name]


def check_loading(memory: float, workers: int | None) -> None:
    """ValueError for a `data.memory` or `data.workers` that can't be."""
    if not memory >= 0:
        raise ValueError(f"data.memory={memory} must be at least 0 GiB")
    if workers is not None and workers < 1:
        raise ValueError(f"data.workers={workers} must be null or at least 1")


def sort_classes(names: set[str]) -> tuple[str, ...]:
    """Classes in the order of their indices: numbers by value, else names by letters."""
    numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def divide(
    division: Division, strata: Labels, groups: Labels | None, test: NDArray[np.bool_] | None
) -> tuple[Labels, Labels]:
    """Indices of the training and of the test samples, in mixed order.

    test: whether each sample is for testing, where the data say so and `division` does not want it otherwise.
    """
    if test is None:
        test = division.test(strata, groups)
    order = mixed_order(strata, groups, division.seed)
    return order[~test[order]], order[test[order]]


def check_classes(where: Path, classes: Sequence[str], parts: Sequence[Labels], division: Division) -> None:
    """ValueError if there is one class only, or one that the training or the test `parts` (labels) have none of."""
    if len(classes) < 2:
        raise ValueError(f"{where} holds one class only, {classes[0]!r}: there must be at least two to tell apart")
    advice = f" with {division}" if division.wanted else ""
    for part, labels in zip(("train", "test"), parts, strict=True):
        counts = np.bincount(labels, minlength=len(classes))
        if not counts.all():
            raise ValueError(f"{where}: class {classes[int(counts.argmin())]!r} has no image to {part} on{advice}")


def describe_own(path: str, parts: Sequence[Labels], noun: str, what: str, division: Division) -> str:
    """`DataSet.source` of own data: "own: parts, 80 images to train and 20 to test, 2 classes"."""
    train, test = map(len, parts)
    return division.after(f"own: {path}, {train:,} {noun} to train and {test:,} to test, {what}")
