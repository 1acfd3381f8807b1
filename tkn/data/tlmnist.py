"""tlMNIST: MNIST's digits in the top left quadrant of 56x56 images, three others around them (Sec. 4.1, Fig. 3)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tkn.data.base import DataSet, Split
from tkn.data.mnist import load_mnist
from tkn.data.preparation import Preparation


def load_tlmnist(data_dir: Path, *, source: str = "auto", distractor_seed: int = 0) -> DataSet:
    """tlMNIST, 56x56 gray, generated from MNIST; `source` as in `load_mnist`.

    The label is the top left digit's; the other quadrants hold other digits of the same partition, drawn uniformly.
    The same `distractor_seed` gives the same images on every machine.
    """
    if distractor_seed < 0:
        raise ValueError(f"data.distractor_seed={distractor_seed} must not be negative")
    mnist = load_mnist(data_dir, source=source)
    # NumPy guarantees RandomState's stream never to change, unlike torch's and its own newer generators'.
    random = np.random.RandomState(distractor_seed)
    return replace(
        mnist,
        name="tlmnist",
        input_size=(1, 56, 56),
        train=_with_distractors(mnist.train, random),
        test=_with_distractors(mnist.test, random),
        preparation=Preparation(1, (56, 56)),
    )


def _with_distractors(split: Split, random: np.random.RandomState) -> Split:
    (digits,) = split.inputs
    count = len(digits)
    # A step of 1 to count - 1 places around the partition: never the digit itself.
    step = torch.from_numpy(random.randint(1, count, size=(3, count)))
    top_right, bottom_left, bottom_right = digits[(torch.arange(count) + step) % count]
    images = torch.cat((torch.cat((digits, top_right), -1), torch.cat((bottom_left, bottom_right), -1)), -2)
    return Split((images,), split.targets)
