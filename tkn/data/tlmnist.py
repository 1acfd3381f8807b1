"""tlMNIST: MNIST's digits in the top left quadrant of 56x56 images, three others around them (Sec. 4.1, Fig. 3)."""

from __future__ import annotations

from pathlib import Path

import torch
from numpy.random import RandomState

from tkn.data.base import DataSet, Split
from tkn.data.mnist_among import among_distractors, other_digits


def load_tlmnist(data_dir: Path, *, source: str = "auto", distractor_seed: int = 0) -> DataSet:
    """tlMNIST, 56x56 gray, generated from MNIST; `source` as in `load_mnist`.

    The label is the top left digit's; the other quadrants hold other digits of the same partition, drawn uniformly.
    The same `distractor_seed` gives the same images on every machine.
    """
    return among_distractors("tlmnist", 56, _with_distractors, data_dir, source, distractor_seed)


def _with_distractors(split: Split, random: RandomState) -> Split:
    (digits,) = split.inputs
    top_right, bottom_left, bottom_right = digits[torch.from_numpy(other_digits(random, 3, len(digits)))]
    images = torch.cat((torch.cat((digits, top_right), -1), torch.cat((bottom_left, bottom_right), -1)), -2)
    return Split((images,), split.targets)
