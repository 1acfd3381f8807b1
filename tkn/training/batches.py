"""Data sets as Lightning sees them: batches are index slices of tensors that live on the training device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from math import ceil

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from tkn.data.base import DataSet, Read, Split, ToInput

#: An evaluation keeps no activations, and a GPU is busy with larger batches: so many times the training's.
_GPU_EVALUATION = 4


def _step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """The seed of what one process draws in one training step."""
    return int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1)[0])


class Batches:
    """Iterates a split in batches (input float32 [B, C, H, W], targets [B, ...]), with no worker processes.

    With `read`, the images of the next batch are read from their files, in another thread, while a batch is worked on.

    With `seed`, for training: augmented, and in an order drawn from (seed, epoch) alone. Torch's random numbers are
    seeded anew before every batch, so that a run that is continued at any step draws what an uninterrupted one would
    (augmentation, dropout); `state_dict` tells the step, as Lightning's loops want it of a loader.

    Of several processes (`world`), the one of this `rank` gets its part: in training of every batch, so that a step
    sees `batch_size` images in all; in evaluation of the whole split, no image twice.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        to_input: ToInput,
        *,
        read: Read | None = None,
        device: torch.device | None = None,
        memory_format: torch.memory_format = torch.channels_last,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.batch_size = batch_size
        self.to_input = to_input
        self.memory_format = memory_format
        self.read = read
        #: where batches go that are read from files; others are where the split is
        self.device = device
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world = world
        if seed is None:
            self.split = split.select(_part(0, len(split), rank, world))
            self.count = len(self.split)
        else:
            self.split = split
            # A part of one image has no variance, and batch normalisation of it no meaning.
            rest = len(split) % batch_size
            self.count = len(split) - (rest if rest < min(2 * world, batch_size) else 0)
        self._first = 0
        self._given = 0

    def __len__(self) -> int:
        return ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.seed is None:
            starts = range(0, self.count, self.batch_size)
            for part in self._parts(slice(start, min(start + self.batch_size, self.count)) for start in starts):
                yield self._batch(part, augment=False)
            return
        epoch = self.epoch()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self.split), generator=generator).to(self.split.targets.device)
        first, self._first = self._first, 0
        steps = range(first, len(self))
        edges = ((step * self.batch_size, min((step + 1) * self.batch_size, self.count)) for step in steps)
        indices = (shuffled[_part(start, end, self.rank, self.world)] for start, end in edges)
        for step, part in zip(steps, self._parts(indices), strict=True):
            torch.manual_seed(_step_seed(self.seed, epoch, step, self.rank))
            self._given = step + 1
            yield self._batch(part, augment=True)

    def images(self, step: int) -> int:
        """How many images the training batch of this step has, in all processes together."""
        return min(self.batch_size, self.count - step * self.batch_size)

    def _parts(self, indices: Iterable[Tensor | slice]) -> Iterator[Split]:
        """The samples at each of the indices, with their images."""
        selected = (self.split.select(index) for index in indices)
        if self.read is None:
            yield from selected
            return
        with ThreadPoolExecutor(1) as reader:
            ahead = deque(reader.submit(self._load, part) for part in islice(selected, 1))
            while ahead:
                present = ahead.popleft().result()
                ahead.extend(reader.submit(self._load, part) for part in islice(selected, 1))
                yield present

    def _load(self, part: Split) -> Split:
        assert self.read is not None
        return Split(self.read(part.inputs), part.targets)

    def _batch(self, part: Split, *, augment: bool) -> tuple[Tensor, Tensor]:
        batch = part if self.device is None else part.to(self.device)
        x = self.to_input(batch.inputs, augment)
        return x.contiguous(memory_format=self.memory_format), batch.targets

    def state_dict(self) -> dict[str, int]:
        """How many batches of the present epoch have been given out."""
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration begins after so many batches."""
        self._first = state["given"]


def _part(start: int, end: int, rank: int, world: int) -> slice:
    """The share of process `rank` of `world` in the range: shares differ by one at most."""
    return slice(start + (end - start) * rank // world, start + (end - start) * (rank + 1) // world)


class TensorDataModule(pl.LightningDataModule):
    """Training, evaluation and test batches of a `DataSet`.

    Args:
        batch_size: images a training step.
        limit: keep the first so many training images (before any are held out).
        validation: hold out the last so many training images for the evaluation after every epoch, which otherwise
            is on the test set.
        seed: of the training order.
    """

    def __init__(
        self, data: DataSet, batch_size: int, *, limit: int | None = None, validation: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        available = len(data.train)
        if limit is not None and not 1 <= limit <= available:
            raise ValueError(f"data.limit={limit} must be 1 to {available:,}, the training images of {data.name}")
        kept = available if limit is None else limit
        if not 0 <= validation < kept:
            raise ValueError(f"data.validation={validation} must be 0 to {kept - 1:,}, less than the training images")
        if validation and data.grouped:
            raise ValueError(
                f"data.validation={validation} must be 0 where images come in groups, as those of a subject: "
                "what is held out would be of groups that are trained on"
            )
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.train_split = data.train.select(slice(0, kept - validation))
        self.eval_split = data.train.select(slice(kept - validation, kept)) if validation else data.test
        #: of the inputs; channels last is faster on CPUs and with tensor cores for most networks
        self.memory_format = torch.channels_last
        #: what the evaluation after every epoch is on
        self.eval_name = "valid" if validation else "test"

    def train_dataloader(self) -> Batches:
        return self._batches(self._on_device(self.train_split), seed=self.seed)

    @property
    def train_batches(self) -> int:
        """How many there are in an epoch for each process."""
        return len(self._batches(self.train_split, seed=self.seed))

    def val_dataloader(self) -> Batches:
        return self._batches(self._on_device(self.eval_split))

    def test_dataloader(self) -> Batches:
        return self._batches(self._on_device(self.data.test))

    def _on_device(self, split: Split) -> Split:
        assert self.trainer is not None
        return split if self.data.read else split.to(self.trainer.strategy.root_device)

    def _batches(self, split: Split, seed: int | None = None) -> Batches:
        trainer = self.trainer
        assert trainer is not None
        larger = seed is None and trainer.strategy.root_device.type != "cpu"
        return Batches(
            split,
            self.batch_size * (_GPU_EVALUATION if larger else 1),
            self.data.to_input,
            read=self.data.read,
            device=trainer.strategy.root_device if self.data.read else None,
            memory_format=self.memory_format,
            seed=seed,
            epoch=lambda: trainer.current_epoch,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
