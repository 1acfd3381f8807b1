"""What a run keeps while it trains: its history, a line an epoch, its last and best checkpoints."""

from __future__ import annotations

import csv
import io
import logging
import shutil
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, Checkpoint, RichProgressBar

from tkn.files import whole_file, write_whole
from tkn.training.module import TargetedTraining

_log = logging.getLogger(__name__)


def shortened(value: float) -> float:
    """A loss or error as it is written to files: float32 holds no more than six digits safely."""
    return float(f"{value:.6g}")


class History(Callback):
    """One row of metrics an epoch; rewritten whole into metrics.csv, and carried along in the checkpoints.

    Columns: epoch, lr, train/..., valid/... or test/..., macs_roi, step_seconds (the median training step), seconds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.started = 0.0
        self.lr = 0.0
        self.step_ends: list[float] = []

    def on_fit_start(self, _trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        if self.rows:  # of the run that is continued
            self._write()

    def on_train_epoch_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        self.started = time.perf_counter()
        # Now: at the epoch's end the schedule has already moved on.
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.step_ends = [time.perf_counter()]

    def on_train_batch_end(self, *_args: Any) -> None:
        # From end to end: a GPU's steps are only started when the call returns.
        self.step_ends.append(time.perf_counter())

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TargetedTraining)
        metrics = {
            name: shortened(value.item()) for name, value in trainer.callback_metrics.items() if name != "macs_roi"
        }
        row = {
            "epoch": trainer.current_epoch + 1,
            "lr": self.lr,
            **metrics,
            "macs_roi": module.macs_roi,
            "step_seconds": round(median(later - end for end, later in pairwise(self.step_ends)), 5),
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        self.rows.append(row)
        self._write()
        figures = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        _log.info(
            "epoch %d/%s: %s, %.4gM multiply-adds, %.3g s a step, %.1f s",
            row["epoch"],
            trainer.max_epochs,
            figures,
            row["macs_roi"] / 1e6,
            row["step_seconds"],
            row["seconds"],
        )

    def _write(self) -> None:
        table = io.StringIO()
        columns = dict.fromkeys(name for row in self.rows for name in row)
        writer = csv.DictWriter(table, fieldnames=list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.path, table.getvalue())

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


class LastAndBest(Checkpoint):
    """Saves last.ckpt after every epoch, and keeps the one with the lowest evaluated error as best.ckpt; both whole.

    "Lowest" is over the whole history, also that of the run that is continued (from the checkpoint `continued`), whose
    files are brought along. Lightning's ModelCheckpoint would forget them in a new folder.
    """

    def __init__(self, folder: Path, history: History, continued: Path | None) -> None:
        self.last, self.best = folder / "last.ckpt", folder / "best.ckpt"
        self.history = history
        self.continued = continued

    def on_fit_start(self, _trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        if self.continued is None:
            return
        best = self.continued.with_name(self.best.name)
        if not best.is_file():
            raise FileNotFoundError(f"checkpoint={self.continued} can be continued only with {best} beside it")
        for source, target in ((self.continued, self.last), (best, self.best)):
            if source.resolve() != target.resolve():
                _copy(source, target)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TargetedTraining)
        with whole_file(self.last) as temporary:
            trainer.save_checkpoint(temporary)
        *before, now = (row[module.monitor] for row in self.history.rows)
        if not before or now < min(before):
            _copy(self.last, self.best)


def _copy(source: Path, target: Path) -> None:
    with whole_file(target) as temporary:
        shutil.copyfile(source, temporary)


class ProgressBar(RichProgressBar):
    """A bar an epoch with loss and error so far, the last evaluation's error, multiply-adds; it stays on the screen."""

    def __init__(self) -> None:
        # Reading the means waits for a GPU, so not at every step.
        super().__init__(refresh_rate=10, leave=True)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        assert isinstance(pl_module, TargetedTraining)
        error = pl_module.error_names[0]
        shown: dict[str, int | str | float | dict[str, float]] = {}
        for name in ("loss", error):
            mean = pl_module.mean("train", name)
            if mean.update_called:
                shown[name] = f"{mean.compute().item():.3f}"
        evaluated = pl_module.monitor
        if evaluated in trainer.callback_metrics:
            shown[evaluated] = f"{trainer.callback_metrics[evaluated].item():.3f}"
        return {**shown, "MACs": f"{pl_module.macs_roi / 1e6:.4g}M"}
