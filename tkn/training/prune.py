"""Ending a sweep's hopeless runs early: those that finished runs beat in both, error and multiply-adds."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from tkn.app.messages import first_line
from tkn.data import without_how_read
from tkn.training.module import TargetedTraining
from tkn.training.records.history import History

_log = logging.getLogger(__name__)


def is_hopeless(
    ours: Mapping[str, float], theirs: Sequence[Mapping[str, float]], error: str, config: DictConfig
) -> bool:
    """Whether enough other runs are better than a run, in the error and in the multiply-adds, by a clear margin.

    ours, theirs: the runs' rows of metrics.csv for one epoch. error: the column to compare. config: the group `prune`.
    """
    share = 1 - config.margin
    better = [row for row in theirs if all(row[key] < share * ours[key] for key in (error, "macs_roi"))]
    return len(better) >= config.runs


class Prune(Callback):
    """Ends the training after an epoch that shows that the run is hopeless (see `is_hopeless`), as if it were the last.

    The others are the runs in folders beside this one's that had finished when it started, unpruned, with the same
    `data` (however they are read) and `trainer`. So the decision depends on nothing that happens meanwhile. config: the
    run's configuration.
    """

    def __init__(self, folder: Path, history: History, config: DictConfig) -> None:
        self.folder = folder
        self.history = history
        self.config = config
        #: the metrics of the others, by epoch
        self.others: list[dict[int, dict[str, float]]] = []
        #: the epoch that ended the run, if it was ended early
        self.epoch: int | None = None

    def on_fit_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        if self.config.prune.runs is None:
            self.others, self.epoch = [], None  # also if the run that is continued was ended early
        elif self.epoch is not None:  # the run was ended, but not tested
            trainer.should_stop = True
        elif not self.others:
            # Read by one process: a run may finish in between.
            self.others = trainer.strategy.broadcast(self._finished_runs() if trainer.is_global_zero else [])

    def state_dict(self) -> dict[str, Any]:
        return {"others": self.others, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A continued run is held against the same runs.
        self.others, self.epoch = state_dict["others"], state_dict["epoch"]

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._judge(trainer, module)

    def _judge(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TargetedTraining)
        assert trainer.max_epochs is not None
        done = len(self.history.rows)
        if not self.others or not self.config.prune.grace * trainer.max_epochs < done < trainer.max_epochs:
            return
        rows = [row for metrics in self.others if module.monitor in (row := metrics.get(done, {}))]
        if is_hopeless(self.history.rows[-1], rows, module.monitor, self.config.prune):
            _log.warning(
                "pruned after epoch %d/%d: %d finished runs of the sweep have lower %s and fewer multiply-adds",
                *(done, trainer.max_epochs, self.config.prune.runs, module.monitor),
            )
            self.epoch = done
            trainer.should_stop = True

    def _finished_runs(self) -> list[dict[int, dict[str, float]]]:
        """The metrics by epoch of the runs to compare with; what cannot be read is no run."""
        found = []
        for path in sorted(self.folder.resolve().parent.glob("*/summary.json")):
            try:
                if self._is_comparable(path):
                    found.append(_metrics(path.parent))
            except Exception as error:  # JSON's, YAML's, the system's kinds
                _log.warning("prune: %s is not compared with: %s", path.parent, first_line(error))
        return found

    def _is_comparable(self, summary_path: Path) -> bool:
        summary = json.loads(summary_path.read_text(encoding="utf-8"))
        if summary.get("mode") != "train" or summary.get("pruned_epoch") is not None:
            return False
        config: Any = OmegaConf.load(summary_path.with_name("config.yaml"))
        same_data = without_how_read(config.data) == without_how_read(self.config.data)
        return same_data and bool(config.trainer == self.config.trainer)


def _metrics(folder: Path) -> dict[int, dict[str, float]]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {int(row["epoch"]): row for row in rows}
