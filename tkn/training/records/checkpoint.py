"""Reading checkpoints, with clear errors before anything is built on them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tkn.app.messages import first_line
from tkn.app.schema import flatten
from tkn.data import HOW_READ
from tkn.models import build_model

_log = logging.getLogger(__name__)


def identify(config: DictConfig, input_size: tuple[int, ...], num_outputs: int) -> dict[str, Any]:
    """What a checkpoint is a checkpoint of: the network, and the configuration that trained it, as plain data."""
    return {
        "model": config.model.name,
        "input_size": list(input_size),
        "num_outputs": num_outputs,
        "attention": f"{config.attention.name}, scale_unit {config.attention.scale_unit}",
        "config": OmegaConf.to_container(config, resolve=True),
    }


def read_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """A run's checkpoint, which must be one of the network that `identity` (see `identify`) tells of.

    FileNotFoundError if it is not there, ValueError if it is damaged, foreign or of another network.
    """
    checkpoint = _read(path, "checkpoint=")
    for key in ("model", "input_size", "num_outputs", "attention"):
        _require_same(path, key, checkpoint["tkn"][key], identity[key])
    return checkpoint


def checkpoint_network(path: Path, option: str = "") -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run's checkpoint, in evaluation mode, clipped to its ROIs, and its identity (see `identify`).

    FileNotFoundError if it is not there, ValueError if it is damaged or not of tkn-run; `option`: what messages put
    before the path, such as "rois.path=".
    """
    checkpoint = _read(path, option)
    identity = checkpoint["tkn"]
    attention = identity["config"]["attention"]
    model = build_model(
        identity["model"],
        tuple(identity["input_size"]),
        identity["num_outputs"],
        attention=attention["name"],
        scale_unit=attention["scale_unit"],
        min_size=attention["min_size"],
        clip=True,
    )
    load_weights(model, checkpoint)
    return model.eval(), identity


def _read(path: Path, option: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{option}{path} is not a file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"{option}{path} is damaged or not a checkpoint: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or "config" not in checkpoint.get("tkn", ()):
        raise ValueError(f"{option}{path} was not written by tkn-run")
    return checkpoint


def check_continuation(path: str | Path, checkpoint: dict[str, Any], config: DictConfig) -> None:
    """ValueError if a run of `config` cannot continue `checkpoint`: other data, attention or seed, so another run.

    The penalty, the schedule and the loss may change, with a warning; the optimiser goes on with its state.
    """
    before: dict[str, Any] = {**checkpoint["tkn"]["config"]}
    now: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    for side in (before, now):
        side["data"] = {key: value for key, value in side["data"].items() if key not in HOW_READ}
    for group in ("seed", "model", "data", "attention"):
        _require_same(path, group, before[group], now[group])
    if before["recipe"].keys() != now["recipe"].keys():
        raise ValueError(f"checkpoint={path} was written by another version: it can be tested, but not continued")
    # The first are part of the optimiser's state; with and without an average there are different networks.
    for key in ("optimizer", "weight_decay_as", "attention_lr_factor", "ema_decay"):
        _require_same(path, f"recipe.{key}", before["recipe"][key], now["recipe"][key])
    earlier, later = (flatten({group: side[group] for group in ("penalty", "recipe")}) for side in (before, now))
    for key, value in later.items():
        if earlier.get(key) != value:
            _log.warning(
                "checkpoint=%s was trained with %s=%s, and goes on with %s", path, key, earlier.get(key), value
            )


def _require_same(path: str | Path, key: str, theirs: Any, ours: Any) -> None:
    if isinstance(theirs, dict) and isinstance(ours, dict) and theirs.keys() == ours.keys():
        for inner in theirs:
            _require_same(path, f"{key}.{inner}", theirs[inner], ours[inner])
    elif theirs != ours:
        raise ValueError(f"checkpoint={path} is of {key}={theirs}, but this run is of {key}={ours}")


def load_weights(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put a checkpoint's weights into the model that it was made of."""
    prefix = "model."
    weights = {
        name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)
    }
    model.load_state_dict(weights)
