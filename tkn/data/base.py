"""What every data set of the project is turned into: tensors in memory, and how a batch becomes an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tkn.app.messages import unknown
from tkn.data.preparation import Preparation

Task = Literal["classification", "regression"]

#: `data.source` of a set that is read from its files or downloaded: "full" refuses a smaller one.
SOURCES = ("auto", "full")

#: (batch tensors, augment) -> network input [B, C, H, W], float32; runs on the tensors' device.
ToInput = Callable[[tuple[Tensor, ...], bool], Tensor]


def to_unit_range(batch: tuple[Tensor, ...], augment: bool) -> Tensor:  # noqa: ARG001
    """Pixels / 255, nothing else (Sec. 4.1): uint8 [B, C, H, W] -> float32 [B, C, H, W] in [0, 1]."""
    (images,) = batch
    return images.float().div_(255)


@dataclass(frozen=True)
class Split:
    """One partition, whole in memory.

    `inputs`: tensors indexed together along their first dimension (uint8 images [N, C, H, W] first);
    `targets`: int64 [N] for classification, float32 [N, 1] for regression.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def __post_init__(self) -> None:
        assert all(len(tensor) == len(self.targets) for tensor in self.inputs)

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, index: Tensor | slice) -> Split:
        """The samples at `index` (a slice shares memory)."""
        return Split(tuple(tensor[index] for tensor in self.inputs), self.targets[index])

    def to(self, device: torch.device) -> Split:
        return Split(tuple(tensor.to(device) for tensor in self.inputs), self.targets.to(device))


@dataclass(frozen=True)
class DataSet:
    """A data set as the trainer sees it.

    `source` says where the samples come from ("full", "embedded: ...", "synthetic: ...") and is written into
    every output of a run; `input_size` is (C, H, W) after `to_input`. `classes` are a classification's names by
    index. `preparation` makes of one image what `to_input` makes of the test images; None where an image alone does
    not do, as with faces, whose landmarks are needed too.
    """

    name: str
    source: str
    task: Task
    input_size: tuple[int, int, int]
    num_outputs: int
    train: Split
    test: Split
    to_input: ToInput = to_unit_range
    classes: tuple[str, ...] = ()
    preparation: Preparation | None = None

    def __post_init__(self) -> None:
        assert not self.classes or len(self.classes) == self.num_outputs


def check_source(source: str, choices: tuple[str, ...] = SOURCES) -> None:
    """ValueError with the nearest choice if there is no such `data.source`."""
    if source not in choices:
        raise ValueError(unknown("data.source", source, choices))


def is_whole(source: str) -> bool:
    """Whether a `DataSet.source` tells of a whole benchmark: only results on it compare with published ones."""
    return source.startswith("full")


def describe_counts(source: str, folder: Path, counts: tuple[int, int], full: tuple[int, int]) -> str:
    """`DataSet.source` for (train, test) `counts`: "full" or "partial: ..."; ValueError if "full" was asked for."""
    if counts == full:
        return "full"
    found = f"{counts[0]:,}/{counts[1]:,} of {full[0]:,}/{full[1]:,} images"
    if source == "full":
        raise ValueError(f"data.source='full': {folder} holds {found}")
    return f"partial: {found}"
