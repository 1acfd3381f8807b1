"""metrics.csv: a row of metrics an epoch, which is also the line that a run logs."""

from __future__ import annotations

import logging
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from tkn.app.files import csv_text, write_whole
from tkn.moving import remade_count
from tkn.training.module import TargetedTraining

_log = logging.getLogger(__name__)


def shortened(value: float) -> float:
    """A loss or error as it is written to files: float32 holds no more than six digits safely."""
    return float(f"{value:.6g}")


def _now(device: torch.device) -> float | torch.cuda.Event:
    """This moment; of a CUDA GPU the one when it will have done what has been started on it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """The seconds between two moments of one device."""
    if isinstance(start, float):
        assert isinstance(end, float)
        return end - start
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return start.elapsed_time(end) / 1000


class History(Callback):
    """One row of metrics an epoch; rewritten whole into metrics.csv, and carried along in the checkpoints.

    Columns: epoch, lr (of the epoch's first step), train/..., valid/... or test/..., macs_roi, on a GPU roi_overruns
    (how often ROIs left the bounds that they were computed in), step_seconds (the median training step), seconds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.run_started = time.perf_counter()
        #: of the run that is continued, up to its last save
        self.earlier_seconds = 0.0
        self.earlier_epoch_seconds = 0.0
        self.epoch_started = 0.0
        self.lr = 0.0
        self.step_ends: list[float | torch.cuda.Event] = []
        self.overruns_before = 0

    @property
    def wall_seconds(self) -> float:
        """The run's seconds until now, with those of the run that it continues."""
        return self.earlier_seconds + time.perf_counter() - self.run_started

    @property
    def epoch_seconds(self) -> float:
        """This epoch's seconds until now, with those before the run was continued."""
        return self.earlier_epoch_seconds + time.perf_counter() - self.epoch_started

    def on_fit_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        if self.rows and trainer.is_global_zero:  # of the run that is continued
            write_whole(self.path, csv_text(self.rows))

    def on_train_start(self, _trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # An epoch that is continued does not start again.
        self._start_clock(module.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.earlier_epoch_seconds = 0.0
        # Now: later in the epoch the schedule has moved on.
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]
        self._start_clock(module.device)

    def _start_clock(self, device: torch.device) -> None:
        self.overruns_before = remade_count()
        self.epoch_started = time.perf_counter()
        self.step_ends = [_now(device)]

    def on_train_batch_end(self, _trainer: pl.Trainer, module: pl.LightningModule, *_args: Any) -> None:
        # From end to end: on a GPU the call has only started the step.
        self.step_ends.append(_now(module.device))

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TargetedTraining)
        metrics = {name: shortened(value.item()) for name, value in trainer.callback_metrics.items()}
        row = {
            "epoch": trainer.current_epoch + 1,
            "lr": self.lr,
            **metrics,
            "macs_roi": module.macs_roi,
            **({"roi_overruns": remade_count() - self.overruns_before} if module.device.type == "cuda" else {}),
            "step_seconds": round(median(_seconds(end, later) for end, later in pairwise(self.step_ends)), 5),
            "seconds": round(self.epoch_seconds, 3),
        }
        self.rows.append(row)
        if not trainer.is_global_zero:
            return
        write_whole(self.path, csv_text(self.rows))
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

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "lr": self.lr,
            "wall_seconds": self.wall_seconds,
            "epoch_seconds": self.epoch_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self.lr = state_dict["lr"]
        self.earlier_seconds = state_dict["wall_seconds"]
        self.earlier_epoch_seconds = state_dict["epoch_seconds"]
