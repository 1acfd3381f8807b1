"""What every data set of the project is turned into: tensors in memory, and how a batch becomes an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from tkn.app.messages import unknown
from tkn.data.fold_source import read_fold
from tkn.data.preparation import Preparation

Task = Literal["classification", "regression"]
TASKS = get_args(Task)

#: `data.source` of a set that is read from its files or downloaded: "full" refuses a smaller one.
SOURCES = ("auto", "full")

#: (batch tensors) -> batch tensors with the images that the split holds only the numbers of; in a thread of its own.
Read = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

#: (batch tensors, augment) -> network input [B, C, H, W], float32; runs on the tensors' device.
ToInput = Callable[[tuple[Tensor, ...], bool], Tensor]


def to_unit_range(batch: tuple[Tensor, ...], augment: bool) -> Tensor:  # noqa: ARG001
    """Pixels / 255, nothing else (Sec. 4.1): uint8 [B, C, H, W] -> float32 [B, C, H, W] in [0, 1]."""
    (images,) = batch
    return images.float().div_(255)


@dataclass(frozen=True)
class Split:
    """One partition, in memory.

    `inputs`: tensors indexed together along their first dimension: uint8 images [N, C, H, W], or whatever a data set's
    `to_input` makes a network's input of;
    `targets`: int64 [N] for classification, float32 [N, outputs] for regression.

    ValueError for tensors of different lengths.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def __post_init__(self) -> None:
        lengths = [len(tensor) for tensor in (*self.inputs, self.targets)]
        if len(set(lengths)) != 1 or not self.inputs:
            raise ValueError(f"a split's inputs and targets have lengths of {lengths}, expected the same")

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, index: Tensor | slice) -> Split:
        """The samples at `index` (a slice shares memory)."""
        return Split(tuple(tensor[index] for tensor in self.inputs), self.targets[index])

    def evenly(self, count: int) -> Split:
        """`count` samples, or as many as there are, evenly spaced over all, the first and the last among them."""
        count = min(count, len(self))
        return self.select(torch.arange(count) * (len(self) - 1) // max(1, count - 1))

    def to(self, device: torch.device) -> Split:
        return Split(tuple(tensor.to(device) for tensor in self.inputs), self.targets.to(device))


@dataclass(frozen=True)
class DataSet:
    """A data set as the trainer sees it.

    name: as in `data.name`.
    source: where the samples come from ("full", "embedded: ...", "own: ..."); written into every output of a run.
    task: "classification" or "regression".
    input_size: (C, H, W) after `to_input`.
    num_outputs: classes, or a regression's numbers.
    to_input: a batch's tensors on the training device -> the network's input, augmented in training.
    classes: a classification's names by index.
    preparation: makes of one image what `to_input` makes of the test images; None where an image alone does not do, as
        with faces, whose landmarks are needed too.
    read: where the images are not in memory: what gets them from their files, before `to_input`.
    grouped: whether the samples come in groups (subjects) that must not be parted.

    ValueError, one line, for what does not fit together.
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
    read: Read | None = None
    grouped: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(unknown(f"task of data={self.name}:", self.task, TASKS))
        if self.classes and self.task == "regression":
            raise ValueError(f"data={self.name}: classes are for task=classification, this is a regression")
        if self.classes and len(self.classes) != self.num_outputs:
            raise ValueError(f"data={self.name}: {len(self.classes)} classes, but num_outputs={self.num_outputs}")
        for part, split in (("train", self.train), ("test", self.test)):
            problem = self._problem(split)
            if problem:
                raise ValueError(f"data={self.name}: the targets of {part} {problem}")

    def _problem(self, split: Split) -> str | None:
        """What is wrong with a split's targets, in words that follow them."""
        targets = split.targets
        if not len(targets):
            return "are none: there must be at least one image"
        if self.task == "regression":
            right = targets.dtype == torch.float32 and targets.shape == (len(targets), self.num_outputs)
            return None if right else f"are {_shape(targets)}, expected float32 [N, {self.num_outputs}]"
        if targets.dtype != torch.int64 or targets.dim() != 1:
            return f"are {_shape(targets)}, expected int64 [N]"
        low, high = int(targets.min()), int(targets.max())
        return (
            None if 0 <= low <= high < self.num_outputs else f"run from {low} to {high}, not 0..{self.num_outputs - 1}"
        )

    def inputs(self, split: Split, augment: bool = False) -> Tensor:
        """A few samples as the network gets them: float32 [N, C, H, W]."""
        return self.to_input(self.read(split.inputs) if self.read else split.inputs, augment)


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_source(source: str, choices: tuple[str, ...] = SOURCES) -> None:
    """ValueError with the nearest choice if there is no such `data.source`."""
    if source not in choices:
        raise ValueError(unknown("data.source", source, choices))


def is_whole(source: str) -> bool:
    """Whether a `DataSet.source` tells of a whole benchmark: only results on it compare with published ones.

    Those on a fold do not: published ones are of another division.
    """
    return source.startswith("full") and read_fold(source) is None


def is_own(source: str) -> bool:
    """Whether a `DataSet.source` tells of a user's own data, and of all of them: no benchmark's."""
    return source.startswith("own: ")


def describe_counts(source: str, folder: Path, counts: tuple[int, int], full: tuple[int, int]) -> str:
    """`DataSet.source` for (train, test) `counts`: "full" or "partial: ..."; ValueError if "full" was asked for."""
    if counts == full:
        return "full"
    found = f"{counts[0]:,}/{counts[1]:,} of {full[0]:,}/{full[1]:,} images"
    if source == "full":
        raise ValueError(f"data.source='full': {folder} holds {found}")
    return f"partial: {found}"
