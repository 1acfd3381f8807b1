"""What a run logs to an experiment tracker beside metrics.csv, whichever tracker it is."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.seed import isolate_rng

from tkn.app.messages import message
from tkn.drawing.figures import attention_maps
from tkn.training.batches import TensorDataModule
from tkn.training.module import TargetedTraining
from tkn.training.networks import model_title
from tkn.training.records.history import History
from tkn.training.records.summary import describe_source, run_title

#: Trackers may draw random numbers for names and such. (Looking at a GPU's would take memory on every one.)
_own_random_numbers = isolate_rng(include_cuda=False)


class RunLog(Callback):
    """Logs the rows of metrics.csv (step: epoch), attention maps, the configuration and the summary's numbers.

    One process has it. The Trainer gets no logger, for it would log the same values under other steps.

    Args:
        config: the run's checked configuration.
        folder: the run's folder, whose name becomes the run's in the tracker.
        history: the rows; its epoch must be in it before this callback's epoch ends.
    """

    #: importable names that the tracker needs
    packages: ClassVar[tuple[str, ...]]

    def __init__(self, config: DictConfig, folder: Path, history: History) -> None:
        self.config = config
        self.folder = folder
        self.history = history
        self.title = ""
        self.drawn_epoch: int | None = None
        name = config.logger.name
        for package in self.packages:
            if find_spec(package) is None:
                raise ValueError(f"logger={name} needs the package {package} (the extra '{name}')")
        #: whether this folder has been logged before
        self.resumed = False
        try:
            self.logger = self.open()
            # Now, and not at the first epoch's end: it may be refused.
            _ = self.logger.experiment  # type: ignore[attr-defined]
        except Exception as error:  # each tracker raises its own kinds
            raise ValueError(f"logger={name}: {message(error)}") from error

    def open(self) -> Logger:
        """Lightning's logger for this run; sets `resumed`."""
        raise NotImplementedError

    def log_values(self, values: Mapping[str, float], epoch: int) -> None:
        self.logger.log_metrics(values, epoch)  # type: ignore[arg-type]

    def log_image(self, image: Image.Image, epoch: int) -> None:
        raise NotImplementedError

    def log_config(self, config: dict[str, Any]) -> None:
        self.logger.log_hyperparams(config)

    def log_summary(self, numbers: dict[str, float], epoch: int) -> None:
        self.log_values(numbers, epoch)

    def begin(self, first_epoch: int) -> None:
        """What is left of an earlier run in this folder, from `first_epoch` on, no longer counts."""

    def close(self, failed: bool) -> None:
        self.logger.finalize("failed" if failed else "success")

    @property
    def described(self) -> dict[str, str]:
        """What a run is looked for by."""
        names = {"model": model_title(self.config), "data": self.config.data.name, "experiment": self.config.experiment}
        return {key: name for key, name in names.items() if name is not None}

    @_own_random_numbers
    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        assert isinstance(module, TargetedTraining)
        if stage == "test" and self.config.mode == "train":
            return  # the test at the end of a training
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, TensorDataModule)
        source = describe_source(datamodule.data.source, self.config)
        self.title = run_title(module.architecture.title, self.config.data.name, source)
        config: dict[str, Any] = OmegaConf.to_container(self.config)  # type: ignore[assignment]
        self.log_config({**config, "data_source": source, "folder": str(self.folder.resolve())})
        self.logger.save()

    @_own_random_numbers
    def on_fit_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        # Of the run that is continued.
        rows = self.history.rows
        if self.resumed and trainer.ckpt_path and Path(trainer.ckpt_path).resolve().parent == self.folder.resolve():
            self.begin(len(rows) + 1)
            return
        self.begin(0)
        for row in rows:
            self._log_row(row)

    @_own_random_numbers
    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TargetedTraining)
        row = self.history.rows[-1]
        self._log_row(row)
        epoch = int(row["epoch"])
        if epoch in (1, trainer.max_epochs) or epoch % self.config.logger.images_every_epochs == 0:
            self._log_maps(module, epoch)
        # On the disk before the epoch's checkpoint, from which a continued run goes on.
        self.logger.save()

    @_own_random_numbers
    def finish(self, module: TargetedTraining, summary: Mapping[str, Any]) -> None:
        """Log the numbers of summary.json, as summary/..., at the run's last epoch."""
        epoch = summary["epochs"]
        if self.drawn_epoch != epoch:  # only tested, or ended early
            self._log_maps(module, epoch)
        numbers = {f"summary/{key}": value for key, value in summary.items() if type(value) in (int, float)}
        self.log_summary(numbers, epoch)

    def _log_row(self, row: Mapping[str, float]) -> None:
        self.log_values({name: value for name, value in row.items() if name != "epoch"}, int(row["epoch"]))

    def _log_maps(self, module: TargetedTraining, epoch: int) -> None:
        if not module.map_sizes:
            return
        self.drawn_epoch = epoch
        title = f"{self.title}, epoch {epoch}" if epoch else self.title
        file = io.BytesIO()
        attention_maps(module.model, module.map_sizes, title).savefig(file, format="png", dpi=150)  # type: ignore[arg-type]
        self.log_image(Image.open(file).convert("RGB"), epoch)
