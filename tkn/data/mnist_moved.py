"""MNIST's digits at random places of 56x56 images, with pieces of other digits around them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tkn.data.base import DataSet, Split
from tkn.data.mnist import load_mnist
from tkn.data.preparation import Preparation

#: Pixels of an image's, a digit's and a piece's side.
_IMAGE, _DIGIT, _PIECE = 56, 28, 8
#: Where pieces are cut from a digit: beyond these its image is mostly empty.
_FIRST, _LAST = 6, 14

Pixels = NDArray[np.uint8]
Places = NDArray[np.int64]


def load_mnist_moved(
    data_dir: Path, *, source: str = "auto", distractors: int = 8, distractor_seed: int = 0
) -> DataSet:
    """MNIST's digits at random places of 56x56 gray images; `source` as in `load_mnist`.

    Every place at which the whole digit's image is inside is as likely. `distractors` pieces of 8x8 pixels, cut from
    other digits of the same partition, lie at random places too, also over the digit: the brighter pixel is seen. The
    same `distractor_seed` gives the same images on every machine.
    """
    for name, value in (("distractors", distractors), ("distractor_seed", distractor_seed)):
        if value < 0:
            raise ValueError(f"data.{name}={value} must not be negative")
    mnist = load_mnist(data_dir, source=source)
    # NumPy guarantees RandomState's stream never to change, unlike torch's and its own newer generators'.
    random = np.random.RandomState(distractor_seed)
    return replace(
        mnist,
        name="mnist_moved",
        input_size=(1, _IMAGE, _IMAGE),
        train=_moved(mnist.train, distractors, random),
        test=_moved(mnist.test, distractors, random),
        preparation=Preparation(1, (_IMAGE, _IMAGE)),
    )


def _moved(split: Split, distractors: int, random: np.random.RandomState) -> Split:
    (inputs,) = split.inputs
    digits: Pixels = inputs[:, 0].numpy()
    count = len(digits)
    images = np.zeros((count, _IMAGE, _IMAGE), dtype=np.uint8)
    _lay(images, digits, random.randint(0, _IMAGE - _DIGIT + 1, size=(2, count)))
    for _ in range(distractors):
        # A step of 1 to count - 1 places around the partition: never the digit itself.
        others = (np.arange(count) + random.randint(1, count, size=count)) % count
        cut = _pixels(random.randint(_FIRST, _LAST + 1, size=(2, count)), _PIECE)
        pieces = digits[(others[:, None, None], *cut)]
        _lay(images, pieces, random.randint(0, _IMAGE - _PIECE + 1, size=(2, count)))
    return Split((torch.from_numpy(images).unsqueeze(1),), split.targets)


def _lay(images: Pixels, pieces: Pixels, places: Places) -> None:
    """Lay pieces [N, S, S] over images [N, H, W], in place, with their corners at places [2, N]."""
    where = (np.arange(len(images))[:, None, None], *_pixels(places, pieces.shape[-1]))
    images[where] = np.maximum(images[where], pieces)


def _pixels(corners: Places, side: int) -> tuple[Places, Places]:
    """The rows [N, side, 1] and columns [N, 1, side] of squares with their corners at [2, N]."""
    along = np.arange(side)
    rows, columns = corners
    return (rows[:, None] + along)[:, :, None], (columns[:, None] + along)[:, None, :]
