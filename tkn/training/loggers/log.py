"""Experiment trackers that a run can log to beside metrics.csv, each through Lightning's logger for it."""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.seed import isolate_rng

from tkn.app.files import write_whole
from tkn.app.messages import message, unknown
from tkn.app.schema import check_rules, typed
from tkn.drawing.figures import attention_maps
from tkn.training.batches import TensorDataModule
from tkn.training.module import TargetedTraining
from tkn.training.records.history import History
from tkn.training.records.summary import describe_source, run_title

#: In a run's folder: which run of a tracker it is, so that it goes on there when it is continued.
RECORD = "logger.json"
IMAGE_KEY = "attention_maps"
_SQLITE = "sqlite:///"


@dataclass
class CsvConfig:
    name: str


@dataclass
class TensorBoardConfig:
    name: str
    images_every_epochs: int


@dataclass
class WandbConfig:
    name: str
    project: str
    entity: str | None
    offline: bool
    images_every_epochs: int


@dataclass
class MLflowConfig:
    name: str
    experiment_name: str
    tracking_uri: str
    images_every_epochs: int


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
        names = {"model": self.config.model.name, "data": self.config.data.name, "experiment": self.config.experiment}
        return {key: name for key, name in names.items() if name is not None}

    @_own_random_numbers
    def setup(self, trainer: pl.Trainer, _module: pl.LightningModule, stage: str) -> None:
        if stage == "test" and self.config.mode == "train":
            return  # the test at the end of a training
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, TensorDataModule)
        source = describe_source(datamodule.data.source, self.config)
        self.title = run_title(self.config.model.name, self.config.data.name, source)
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


class TensorBoardLog(RunLog):
    """Event files in tensorboard/ in the run's folder."""

    packages = ("tensorboard",)
    logger: TensorBoardLogger

    def open(self) -> Logger:
        self.resumed = (self.folder / "tensorboard").is_dir()
        return TensorBoardLogger(self.folder, name="", version="tensorboard", default_hp_metric=False)

    def begin(self, first_epoch: int) -> None:
        if self.resumed:
            # The next file that it opens tells TensorBoard to drop the later epochs of those before.
            writer = self.logger.experiment
            writer.close()
            writer.purge_step = first_epoch

    def log_image(self, image: Image.Image, epoch: int) -> None:
        self.logger.experiment.add_image(IMAGE_KEY, np.asarray(image), epoch, dataformats="HWC")

    def log_summary(self, numbers: dict[str, float], epoch: int) -> None:
        # TensorBoard lists a run's hyperparameters beside its results, only together.
        self.logger.log_hyperparams(self.logger.hparams, numbers, epoch)


class WandbLog(RunLog):
    """A run at Weights & Biases, its files in wandb/ in the run's folder."""

    packages = ("wandb",)
    logger: WandbLogger

    def open(self) -> Logger:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its crash reports go to a third party
        import wandb

        run_id = _recorded(self.folder, "wandb")
        self.resumed = run_id is not None
        if run_id is None:
            run_id = secrets.token_hex(8)
            _record(self.folder, "wandb", run_id)
        # Lightning's own call would print a warning, and name the epochs trainer/global_step.
        run = wandb.init(
            name=self.folder.name,
            dir=self.folder,
            id=run_id,
            resume="allow",
            project=self.config.logger.project,
            entity=self.config.logger.entity,
            mode="offline" if self.config.logger.offline else None,  # None: the environment's WANDB_MODE
            tags=list(self.described.values()),
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.define_metric("*", step_metric="epoch")
        return WandbLogger(save_dir=self.folder, experiment=run)

    def log_values(self, values: Mapping[str, Any], epoch: int) -> None:
        self.logger.log_metrics({**values, "epoch": epoch})

    def log_image(self, image: Image.Image, epoch: int) -> None:
        import wandb

        self.log_values({IMAGE_KEY: [wandb.Image(image)]}, epoch)

    def close(self, failed: bool) -> None:
        super().close(failed)
        # Else the next run of a sweep would go on in this one.
        self.logger.experiment.finish(exit_code=int(failed))


class MLflowLog(RunLog):
    """A run in MLflow's store at `tracking_uri`; one store for all runs, in which they are compared."""

    # mlflow-skinny comes without the last two, which SQLite stores need.
    packages = ("mlflow", "sqlalchemy", "alembic")
    logger: MLFlowLogger

    def open(self) -> Logger:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # "Creating initial database tables..."
        logging.getLogger("pytorch_lightning.loggers.mlflow").setLevel(logging.ERROR)  # "Experiment ... not found."
        uri = self.config.logger.tracking_uri
        artifacts = None
        if uri.startswith(_SQLITE):
            store = Path(uri.removeprefix(_SQLITE)).resolve().parent
            store.mkdir(parents=True, exist_ok=True)
            artifacts = (store / "artifacts").as_uri()
        run_id = _recorded(self.folder, "mlflow")
        if run_id is not None:
            client = mlflow.MlflowClient(uri)
            try:
                self.resumed = client.get_run(run_id).info.lifecycle_stage == "active"
            except MlflowException:  # of another store
                self.resumed = False
        logger = MLFlowLogger(
            self.config.logger.experiment_name,
            run_name=self.folder.name,
            tracking_uri=uri,
            tags={**self.described, "folder": str(self.folder.resolve())},
            artifact_location=artifacts,
            run_id=run_id if self.resumed else None,
        )
        if self.resumed:
            logger.experiment.update_run(run_id, status="RUNNING")
        else:
            _record(self.folder, "mlflow", logger.run_id)
        return logger

    def log_config(self, config: dict[str, Any]) -> None:
        client, run_id = self.logger.experiment, self.logger.run_id
        # MLflow lets no parameter change, as when a run is continued for more epochs; the file tells.
        if not client.get_run(run_id).data.params:
            super().log_config(config)
        client.log_artifact(run_id, self.folder / "config.yaml")

    def log_image(self, image: Image.Image, epoch: int) -> None:
        self.logger.experiment.log_image(self.logger.run_id, image, key=IMAGE_KEY, step=epoch, synchronous=True)


#: name: (its keys, what logs to it)
LOGGERS: dict[str, tuple[type, type[RunLog] | None]] = {
    "csv": (CsvConfig, None),
    "tensorboard": (TensorBoardConfig, TensorBoardLog),
    "wandb": (WandbConfig, WandbLog),
    "mlflow": (MLflowConfig, MLflowLog),
}


def check_logger(options: dict[str, Any]) -> dict[str, Any]:
    """The configuration group `logger`, typed; ValueError naming the first wrong key or value."""
    name = options.get("name")
    if name not in LOGGERS:
        raise ValueError(unknown("logger.name", name, LOGGERS))
    # Within "logger", for the errors to name keys in full.
    checked = typed(make_dataclass("Group", [("logger", LOGGERS[name][0])]), OmegaConf.create({"logger": options}))
    every = checked.logger.get("images_every_epochs", 1)
    check_rules(checked, [("logger.images_every_epochs", every >= 1, "at least 1")])
    return OmegaConf.to_container(checked.logger)  # type: ignore[return-value]


@contextmanager
def open_log(config: DictConfig, folder: Path, history: History) -> Iterator[RunLog | None]:
    """The callback that logs the run as `config.logger` says, None for metrics.csv alone; closed at the block's end.

    ValueError of one line if its package is missing or the tracker cannot be reached.
    """
    kind = LOGGERS[config.logger.name][1]
    if kind is None:
        yield None
        return
    log = kind(config, folder, history)
    try:
        yield log
    except BaseException:
        log.close(failed=True)
        raise
    log.close(failed=False)


def _recorded(folder: Path, name: str) -> str | None:
    path = folder / RECORD
    return json.loads(path.read_text()).get(name) if path.is_file() else None


def _record(folder: Path, name: str, run_id: str | None) -> None:
    path = folder / RECORD
    others = json.loads(path.read_text()) if path.is_file() else {}
    write_whole(path, json.dumps({**others, name: run_id}, indent=2) + "\n")
