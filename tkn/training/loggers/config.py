"""The configuration group `logger`: the keys of each tracker."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import Any

from omegaconf import OmegaConf

from tkn.app.messages import unknown
from tkn.app.schema import check_rules, typed


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


LOGGER_CONFIGS: dict[str, type] = {
    "csv": CsvConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "mlflow": MLflowConfig,
}


def check_logger(options: dict[str, Any]) -> dict[str, Any]:
    """The configuration group `logger`, typed; ValueError naming the first wrong key or value."""
    name = options.get("name")
    if name not in LOGGER_CONFIGS:
        raise ValueError(unknown("logger.name", name, LOGGER_CONFIGS))
    # Within "logger", for the errors to name keys in full.
    checked = typed(make_dataclass("Group", [("logger", LOGGER_CONFIGS[name])]), OmegaConf.create({"logger": options}))
    every = checked.logger.get("images_every_epochs", 1)
    check_rules(checked, [("logger.images_every_epochs", every >= 1, "at least 1")])
    return OmegaConf.to_container(checked.logger)  # type: ignore[return-value]
