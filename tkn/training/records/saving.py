"""What is saved while a run trains, and when, so that a run that is stopped at any moment can be continued."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.types import _PATH
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from tkn.app.files import whole_file
from tkn.app.signals import Interrupted, Signals
from tkn.training.module import TargetedTraining
from tkn.training.records.history import History

#: A killed run loses no more than so much work.
_SAVE_SECONDS = 600.0
#: Asking the other processes waits for a GPU, so there only every so many steps.
_GPU_QUESTION_STEPS = 10


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints whole, and fails if it cannot: Lightning's own way loses a folder's refusal."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        assert storage_options is None
        data = io.BytesIO()
        torch.save(checkpoint, data)
        with whole_file(Path(path)) as temporary:
            temporary.write_bytes(data.getbuffer())


class LastAndBest(Checkpoint):
    """Saves last.ckpt, and keeps the one of the lowest evaluated error as best.ckpt; both whole.

    With a budget best.ckpt is of an epoch that meets it.

    last.ckpt is written after every epoch; before the last step of every epoch, so that a run stopped in the
    evaluation need not train the epoch again; every ten minutes; and when `signals` ask to stop, after which
    `Interrupted` is raised. "Lowest" is over the whole history, also that of the run that is continued (from the
    checkpoint `continued`), whose files are brought along, unless its best network does not meet this run's budget.
    Lightning's ModelCheckpoint would forget them in a new folder.
    """

    def __init__(self, folder: Path, history: History, continued: Path | None, signals: Signals) -> None:
        self.last, self.best = folder / "last.ckpt", folder / "best.ckpt"
        self.history = history
        self.continued = continued
        self.signals = signals
        self.saved_at = time.monotonic()
        self.within_epoch = False
        self.loaded_sums: dict[str, Any] | None = None
        #: the metrics of the epoch that best.ckpt is of
        self.best_row: dict[str, float] | None = None
        self.knows_best = False

    def state_dict(self) -> dict[str, Any]:
        return {"best_row": self.best_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_row, self.knows_best = state_dict["best_row"], True

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TargetedTraining)
        if self.continued is None:
            return
        if not self.knows_best:  # an earlier version's checkpoint
            allowed = filter(module.may_be_best, self.history.rows)
            self.best_row = min(allowed, key=lambda row: row[module.monitor], default=None)
        elif self.best_row is not None and not module.may_be_best(self.best_row):
            self.best_row = None
        if trainer.is_global_zero:
            self._bring_files(self.continued)

    def _bring_files(self, continued: Path) -> None:
        best = continued.with_name(self.best.name)
        # First: where there is a last.ckpt, its best.ckpt must be too.
        if self.best_row is None:
            self.best.unlink(missing_ok=True)
        elif best.is_file():
            _copy(best, self.best)
        else:
            raise FileNotFoundError(f"checkpoint={continued} can be continued only with {best} beside it")
        _copy(continued, self.last)

    def on_train_start(self, _trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TargetedTraining)
        if self.loaded_sums is not None:
            module.set_train_sums(self.loaded_sums)
        # Lightning has put its own handler in place, which talks to other processes from within the signal.
        self.signals.install()
        self.signals.deferred = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, _outputs: Any, _batch: Any, batch_index: int
    ) -> None:
        assert isinstance(module, TargetedTraining)
        done, together = batch_index + 1, trainer.accumulate_grad_batches
        assert isinstance(trainer.num_training_batches, int)
        stop, late = 0, 0
        if trainer.world_size == 1 or module.device.type == "cpu" or done % _GPU_QUESTION_STEPS == 0:
            overdue = time.monotonic() - self.saved_at > _SAVE_SECONDS
            stop, late = _most(trainer, self.signals.received or 0, int(overdue))
        if done < trainer.num_training_batches and done % together == 0:
            if stop or late or done + together >= trainer.num_training_batches:
                module.check_epoch()
                self._save(trainer, within_epoch=True)
            if stop:
                raise Interrupted(stop)

    def on_validation_batch_end(self, *_args: Any) -> None:
        # Each process for itself: they may evaluate different numbers of batches.
        if self.signals.received:
            raise Interrupted(self.signals.received)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TargetedTraining)
        row, key = self.history.rows[-1], module.monitor
        best = module.may_be_best(row) and (self.best_row is None or row[key] < self.best_row[key])
        if best:
            self.best_row = row
        self._save(trainer, within_epoch=False, best=best)
        (stop,) = _most(trainer, self.signals.received or 0)
        if stop:
            raise Interrupted(stop)

    def on_train_end(self, _trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        self.signals.deferred = False

    def on_exception(self, _trainer: pl.Trainer, _module: pl.LightningModule, _error: BaseException) -> None:
        self.signals.deferred = False

    def on_test_start(self, _trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        self.signals.install()

    def on_save_checkpoint(self, _trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, TargetedTraining)
        checkpoint["train_sums"] = module.train_sums() if self.within_epoch else None

    def on_load_checkpoint(self, _trainer: pl.Trainer, _module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.loaded_sums = checkpoint.get("train_sums")

    def _save(self, trainer: pl.Trainer, *, within_epoch: bool, best: bool = False) -> None:
        self.within_epoch = within_epoch
        self.saved_at = time.monotonic()
        # best.ckpt first: a run killed in between makes the same one again.
        for path in (self.best, self.last) if best else (self.last,):
            trainer.save_checkpoint(path)  # by all processes, for all have a part in it; the first one writes


def _most(trainer: pl.Trainer, *values: int) -> list[int]:
    """The greatest of the processes' values, each; called by all of them at the same point."""
    if trainer.world_size == 1:
        return list(values)
    here = torch.tensor(values, device=trainer.strategy.root_device)
    greatest = trainer.strategy.reduce(here, reduce_op="max")
    assert isinstance(greatest, torch.Tensor)
    return greatest.tolist()


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        with whole_file(target) as temporary:
            shutil.copyfile(source, temporary)
