"""Data sets as Lightning sees them: batches are index slices of tensors that live on the training device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil

import pytorch_lightning as pl
import torch
from torch import Tensor

from tkn.data.base import DataSet, Split, ToInput


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of all that an epoch draws: a continued run draws what an uninterrupted one would."""
    return seed * 1_000_003 + epoch


class Batches:
    """Iterates a split in batches (input float32 [B, C, H, W], targets [B, ...]), with no worker processes.

    With `seed`, for training: augmented, and in an order drawn from (seed, epoch) alone, so that an interrupted run
    continues with the same batches.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        to_input: ToInput,
        *,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self.split = split
        self.batch_size = batch_size
        self.to_input = to_input
        self.seed = seed
        self.epoch = epoch

        # A last training batch of one image has no variance, and batch normalisation of it no meaning.
        alone = seed is not None and batch_size > 1 and len(split) % batch_size == 1
        self.count = len(split) - alone

    def __len__(self) -> int:
        return ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        shuffled = None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch()))
            shuffled = torch.randperm(len(self.split), generator=generator).to(self.split.targets.device)
        for start in range(0, self.count, self.batch_size):
            index = slice(start, min(start + self.batch_size, self.count))
            batch = self.split.select(index if shuffled is None else shuffled[index])
            x = self.to_input(batch.inputs, self.seed is not None)
            yield x.contiguous(memory_format=torch.channels_last), batch.targets


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
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.train_split = data.train.select(slice(0, kept - validation))
        self.eval_split = data.train.select(slice(kept - validation, kept)) if validation else data.test
        #: what the evaluation after every epoch is on
        self.eval_name = "valid" if validation else "test"

    def train_dataloader(self) -> Batches:
        return self._batches(self.train_split, seed=self.seed)

    def val_dataloader(self) -> Batches:
        return self._batches(self.eval_split)

    def test_dataloader(self) -> Batches:
        return self._batches(self.data.test)

    def _batches(self, split: Split, seed: int | None = None) -> Batches:
        trainer = self.trainer
        assert trainer is not None
        return Batches(
            split.to(trainer.strategy.root_device),
            self.batch_size,
            self.data.to_input,
            seed=seed,
            epoch=lambda: trainer.current_epoch,
        )
