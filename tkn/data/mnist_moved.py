"""MNIST's digits at random places of 56x56 images, with pieces of other digits around them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray

from tkn.data.base import DataSet, Split
from tkn.data.mnist_among import among_distractors, other_digits

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
    if distractors < 0:
        raise ValueError(f"data.distractors={distractors} must not be negative")
    return among_distractors("mnist_moved", _IMAGE, partial(_moved, distractors), data_dir, source, distractor_seed)


def _moved(distractors: int, split: Split, random: RandomState) -> Split:
    (inputs,) = split.inputs
    digits: Pixels = inputs[:, 0].numpy()
    count = len(digits)
    images = np.zeros((count, _IMAGE, _IMAGE), dtype=np.uint8)
    _lay(images, digits, random.randint(0, _IMAGE - _DIGIT + 1, size=(2, count)))
    for _ in range(distractors):
        (others,) = other_digits(random, 1, count)
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
