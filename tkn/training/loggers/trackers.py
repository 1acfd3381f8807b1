"""The trackers that a run can log to, each through Lightning's logger for it."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from PIL import Image
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from tkn.app.files import write_whole
from tkn.training.loggers.log import RunLog
from tkn.training.records.history import History

#: In a run's folder: which run of a tracker it is, so that it goes on there when it is continued.
RECORD = "logger.json"
IMAGE_KEY = "attention_maps"
_SQLITE = "sqlite:///"


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


#: What logs to the tracker of this name; any other run has metrics.csv alone.
LOGS: dict[str, type[RunLog]] = {"tensorboard": TensorBoardLog, "wandb": WandbLog, "mlflow": MLflowLog}


@contextmanager
def open_log(config: DictConfig, folder: Path, history: History) -> Iterator[RunLog | None]:
    """The callback that logs the run as `config.logger` says, None for metrics.csv alone; closed at the block's end.

    ValueError of one line if its package is missing or the tracker cannot be reached.
    """
    kind = LOGS.get(config.logger.name)
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
