"""Reading checkpoints, with clear errors before anything is built on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tkn.app.messages import first_line, message
from tkn.app.schema import flatten
from tkn.data import without_how_read
from tkn.kinds import PLAIN
from tkn.models import Architecture
from tkn.models.factory import Factory
from tkn.models.weights import run_weights

_log = logging.getLogger(__name__)

#: The group `rois` of a run whose ROIs learn.
_LEARNING_ROIS = {"checkpoint": None, "places": "learned"}


def identify(
    config: DictConfig,
    architecture: Architecture,
    pretrained: Collection[str] = (),
    rois: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a checkpoint is a checkpoint of: the network, and the configuration that trained it, as plain data.

    pretrained: the names of the parameters that had been trained before; rois: where ROIs that do not learn are from.
    """
    return {
        "model": architecture.name,
        "input_size": list(architecture.input_size),
        "num_outputs": architecture.num_outputs,
        "architecture": architecture.to_dict(),
        "pretrained": sorted(pretrained),
        "rois": rois,
        "config": OmegaConf.to_container(config, resolve=True),
    }


def read_checkpoint(path: Path, architecture: Architecture, option: str = "checkpoint=") -> dict[str, Any]:
    """A run's checkpoint, which must be one of the network `architecture`, or of that one made narrower.

    FileNotFoundError if it is not there, ValueError if it is damaged, foreign or of another network; `option`: what
    messages put before the path.
    """
    checkpoint = _read(path, option)
    _require_network(f"{option}{path}", Architecture.from_dict(checkpoint["tkn"]["architecture"]), architecture)
    return checkpoint


def read_rois(
    path: Path, architecture_for: Callable[[tuple[int, int, int], int], Architecture], option: str
) -> dict[str, Any]:
    """A run's checkpoint for its ROIs, which must have been learned by a network as `architecture_for` gives for images
    of (C, H, W) and so many outputs. Errors and `option`: as of `read_checkpoint`."""
    checkpoint = _read(path, option)
    named, theirs = f"{option}{path}", Architecture.from_dict(checkpoint["tkn"]["architecture"])
    architecture = architecture_for(theirs.input_size, theirs.num_outputs)
    _require_network(named, theirs, architecture)
    _require_same(named, "attention.min_size", theirs.attention["min_size"], architecture.attention["min_size"])
    if checkpoint["tkn"].get("rois") is not None:
        raise ValueError(f"{named} is of ROIs that did not learn: name the run that learned them")
    return checkpoint


def _require_network(named: str, theirs: Architecture, architecture: Architecture) -> None:
    """ValueError unless `theirs` is the network `architecture`, or that one made narrower."""
    _require_same(named, "model", theirs.name, architecture.name)
    _require_same(named, "input_size", list(theirs.input_size), list(architecture.input_size))
    _require_same(named, "num_outputs", theirs.num_outputs, architecture.num_outputs)
    if architecture.targeted:
        _require_same(named, "attention.name", theirs.attention["attention"], architecture.attention["attention"])
        _require_same(
            named, "attention.scale_unit", theirs.attention["scale_unit"], architecture.attention["scale_unit"]
        )
        for key, plain in PLAIN.items():
            attentions = theirs.attention, architecture.attention
            _require_same(named, f"attention.{key}", *(attention.get(key, plain) for attention in attentions))
    for key in sorted(theirs.options.keys() | architecture.options.keys()):
        if key != "dropout":  # evaluation has none
            _require_same(named, f"model.{key}", theirs.options.get(key), architecture.options.get(key))


def require_same_thinning(path: Path, checkpoint: dict[str, Any], config: DictConfig) -> None:
    """ValueError if a checkpoint's network is thinner, or less thin, than the configuration says."""
    theirs = checkpoint["tkn"]["config"]["model"].get("thin")
    _require_same(f"checkpoint={path}", "model.thin", theirs, config.model.get("thin"))


def load_model(path: str | Path, *, factory: Factory | str | None = None) -> nn.Module:
    """The trained network of a run's checkpoint (last.ckpt, best.ckpt), in evaluation mode, clipped to its ROIs.

    Reads tensors and plain data only. A network that a user's own code makes (model=python) needs `factory`: the
    function that makes it, or its name "package.module:function", which is then imported; what a file names is never
    imported unasked. FileNotFoundError if there is no such file, ValueError, one line, if it is damaged or not of
    tkn-run, or if `factory` is not given or makes another network.
    """
    return checkpoint_network(Path(path).expanduser(), factory=factory)[0]


def checkpoint_network(
    path: Path, option: str = "", factory: Factory | str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """As `load_model`, with the checkpoint's identity (see `identify`).

    option: what messages put before the path, such as "rois.path=".
    """
    checkpoint = _read(path, option)
    try:
        architecture = Architecture.from_dict(checkpoint["tkn"]["architecture"])
        model = architecture.build(clip=True, factory=factory)
        load_weights(model, checkpoint)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{option}{path}: {message(error)}") from error
    return model.eval(), checkpoint["tkn"]


def _read(path: Path, option: str) -> dict[str, Any]:
    """The content of a checkpoint, with an `architecture` in it also if an earlier version wrote it."""
    if not path.is_file():
        raise FileNotFoundError(f"{option}{path} is not a file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"{option}{path} is damaged or not a checkpoint: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or "config" not in checkpoint.get("tkn", ()):
        raise ValueError(f"{option}{path} was not written by tkn-run")
    identity = checkpoint["tkn"]
    if "architecture" not in identity:
        attention, dropout = identity["config"]["attention"], identity["config"]["model"].get("dropout")
        identity["architecture"] = Architecture(
            identity["model"],
            tuple(identity["input_size"]),
            identity["num_outputs"],
            {} if dropout is None else {"dropout": dropout},
            {"attention": attention["name"], **{key: attention[key] for key in ("scale_unit", "min_size")}},
        ).to_dict()
    return checkpoint


def check_continuation(path: str | Path, checkpoint: dict[str, Any], config: DictConfig) -> None:
    """ValueError if a run of `config` cannot continue `checkpoint`: other data, attention or seed, so another run.

    The penalty, the schedule and the loss may change, with a warning; the optimiser goes on with its state.
    """
    before: dict[str, Any] = {**checkpoint["tkn"]["config"]}
    now: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    for side in (before, now):
        side["data"] = without_how_read(side["data"])
    named = f"checkpoint={path}"
    # Earlier versions knew no other layers, for which these are the defaults.
    before["attention"] = {**PLAIN, **before["attention"]}
    for group in ("seed", "data", "attention"):
        _require_same(named, group, before[group], now[group])
    # Earlier versions lack keys that now are null.
    for key in sorted(before["model"].keys() | now["model"].keys()):
        _require_same(named, f"model.{key}", before["model"].get(key), now["model"].get(key))
    for key in ("checkpoint", "macs", "lr_factor"):
        # An earlier version pruned nothing, and lr_factor is the default's where nothing is pruned.
        unpruned = now["channels"][key] if key == "lr_factor" else None
        _require_same(named, f"channels.{key}", before.get("channels", {}).get(key, unpruned), now["channels"][key])
    for key, value in now["rois"].items():
        # An earlier version's ROIs learned.
        _require_same(named, f"rois.{key}", before.get("rois", _LEARNING_ROIS)[key], value)
    if before["recipe"].keys() != now["recipe"].keys():
        raise ValueError(f"checkpoint={path} was written by another version: it can be tested, but not continued")
    # The first are part of the optimiser's state; with and without an average there are different networks.
    for key in ("optimizer", "weight_decay_as", "attention_lr_factor", "ema_decay"):
        _require_same(named, f"recipe.{key}", before["recipe"][key], now["recipe"][key])
    earlier, later = (flatten({group: side[group] for group in ("penalty", "recipe")}) for side in (before, now))
    for key, value in later.items():
        if earlier.get(key) != value:
            _log.warning(
                "checkpoint=%s was trained with %s=%s, and goes on with %s", path, key, earlier.get(key), value
            )


def _require_same(named: str, key: str, theirs: Any, ours: Any) -> None:
    if isinstance(theirs, dict) and isinstance(ours, dict) and theirs.keys() == ours.keys():
        for inner in theirs:
            _require_same(named, f"{key}.{inner}", theirs[inner], ours[inner])
    elif theirs != ours:
        raise ValueError(f"{named} is of {key}={theirs}, but this run is of {key}={ours}")


def load_weights(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put a checkpoint's weights into the model that it was made of."""
    model.load_state_dict(run_weights(checkpoint))
