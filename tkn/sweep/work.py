"""What a run takes, roughly, before its data are read: for an order of rows, the cheapest first."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from omegaconf import DictConfig

from tkn.data.face_table import find_table
from tkn.data.images import find_images
from tkn.data.own import check_size, find_folder
from tkn.macs import count_macs
from tkn.models.narrow import wanted_macs
from tkn.training.networks import architecture_of


class _Images(NamedTuple):
    """Of a data set: (C, H, W), outputs of a network, training images (docs/data.md)."""

    size: tuple[int, int, int]
    outputs: int
    training: int


_IMAGES = {
    "mnist": _Images((1, 28, 28), 10, 60_000),
    "tlmnist": _Images((1, 56, 56), 10, 60_000),
    "mnist_moved": _Images((1, 56, 56), 10, 60_000),
    "svhn": _Images((3, 32, 32), 10, 73_257),
    "gtsrb": _Images((3, 32, 32), 43, 39_209),
    "pain": _Images((3, 48, 48), 1, 48_398),  # all: the split is by subjects
}


def work(config: DictConfig) -> float:
    """Multiply-adds, forward, for all training images of all epochs; infinite where they can't be told.

    A target layer counts as a dense one, a narrower network by its share. `config`: a checked configuration.
    """
    try:
        images = _images(config.data)
        if images is None:
            return inf
        network = architecture_of(config, images.size, images.outputs).build(factory=config.model.get("factory"))
        dense = count_macs(network, images.size).total_dense
    except (OSError, ValueError):  # the run itself says what is wrong
        return inf
    wanted = config.channels.macs or config.model.get("thin")
    macs = float(dense if wanted is None else wanted_macs(wanted, dense))
    return macs * min(images.training, config.data.limit or images.training) * config.trainer.max_epochs


def _images(data: DictConfig) -> _Images | None:
    """Of a user's own data what their files' names and number say; None of others that are not known."""
    if data.name == "folder" and data.size is not None:
        root = find_folder(data.path)
        part = root / "train" if (root / "train").is_dir() else root
        size = data.size if isinstance(data.size, int) else list(data.size)
        classes = sum(path.is_dir() for path in part.iterdir())
        return _Images((data.channels or 3, *check_size(size)), max(classes, 1), len(find_images(part)))
    if data.name == "faces":
        lines = find_table(find_folder(data.path)).read_bytes().count(b"\n")
        return _Images((3, data.size, data.size), 1, lines)
    return _IMAGES.get(data.name)
