"""What data sets share that show each of MNIST's digits among others of its partition, in larger images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from tkn.data.base import DataSet, Split
from tkn.data.mnist import load_mnist
from tkn.data.preparation import Preparation


def among_distractors(
    name: str,
    side: int,
    make: Callable[[Split, RandomState], Split],
    data_dir: Path,
    source: str,
    distractor_seed: int,
) -> DataSet:
    """The set `name` of gray images of side x side pixels: `make` of MNIST's partitions, of the training one first.

    `source` as in `load_mnist`. The same `distractor_seed` gives the same images on every machine; ValueError if it is
    negative.
    """
    if distractor_seed < 0:
        raise ValueError(f"data.distractor_seed={distractor_seed} must not be negative")
    mnist = load_mnist(data_dir, source=source)
    # NumPy guarantees RandomState's stream never to change, unlike torch's and its own newer generators'.
    random = RandomState(distractor_seed)
    return replace(
        mnist,
        name=name,
        input_size=(1, side, side),
        train=make(mnist.train, random),
        test=make(mnist.test, random),
        preparation=Preparation(1, (side, side)),
    )


def other_digits(random: RandomState, times: int, count: int) -> NDArray[np.int64]:
    """For each of `count` digits of a partition so many others of it, by their places: [times, count]."""
    # A step of 1 to count - 1 places around the partition: never the digit itself.
    places: NDArray[np.int64] = (np.arange(count) + random.randint(1, count, size=(times, count))) % count
    return places
