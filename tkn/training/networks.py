"""From a run's configuration to the network that it trains or tests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from tkn.app.messages import unknown
from tkn.app.options import check_options
from tkn.decay import attention_parameters
from tkn.fixed_rois import PLACES, fix_rois_, freeze_rois_
from tkn.kinds import other_than_plain
from tkn.models import Architecture, check_model_options
from tkn.models.build import default_weights, is_targeted
from tkn.models.channels import require_library
from tkn.models.freezing import freeze_
from tkn.models.names import Names, as_patterns
from tkn.models.narrow import pruned_network, thin_network
from tkn.models.weights import fit_weights, read_weights, run_weights
from tkn.training.records.checkpoint import read_checkpoint, read_rois

_log = logging.getLogger(__name__)

#: Keys of the group `model` that say how it is trained, not what it is.
_TRAINING: dict[str, Any] = {
    "gradient_clip_norm": float | None,
    "weights": str | None,
    "freeze": Names,
    "pretrained_lr_factor": float | None,
    "thin": float | None,
}


@dataclass(frozen=True)
class Start:
    """A network as a run begins with it.

    pretrained: the names of parameters whose values were learned before; frozen: names or patterns of what does not
        learn; rois: of ROIs that do not learn, as plain data, where they are from.
    """

    model: nn.Module
    architecture: Architecture
    pretrained: Collection[str] = ()
    frozen: Sequence[str] = ()
    rois: Mapping[str, Any] | None = None


def check_model(config: DictConfig) -> None:
    """ValueError if a run's `model`, `channels` or `rois` has a wrong key or value, or one that nothing would read."""
    options = _options(config)
    name = options.pop("name", None)
    if name is None:
        raise ValueError("key 'model.name' is missing")
    training = {key: options.pop(key) for key in _TRAINING if key in options}
    check_model_options(name, options)
    check_options("model", name, training, _TRAINING)
    targeted = is_targeted(name, options)
    if config.rois.places not in PLACES:
        raise ValueError(unknown("rois.places", config.rois.places, PLACES))
    for key, valid, wanted in (*_rules(training, targeted, config.channels), *_rois_rules(config, targeted)):
        if not valid:
            raise ValueError(f"{key}={OmegaConf.select(config, key)} {wanted}")
    if config.channels.checkpoint is not None:
        require_library()


def _rules(training: Mapping[str, Any], targeted: bool, channels: DictConfig) -> Iterator[tuple[str, bool, str]]:
    clip_norm, factor, thin = (training.get(key) for key in ("gradient_clip_norm", "pretrained_lr_factor", "thin"))
    yield "model.gradient_clip_norm", clip_norm is None or clip_norm > 0, "must be null or positive"
    yield "model.pretrained_lr_factor", factor is None or factor >= 0, "must be null or at least 0"
    weights = training.get("weights")
    yield "model.pretrained_lr_factor", factor is None or weights is not None, "has no effect without model.weights"
    yield "model.thin", thin is None or thin > 0, "must be null or positive"
    yield "model.thin", thin is None or not targeted, "is for dense networks, and this one has target layers"
    yield "model.thin", thin is None or weights is None, "makes a network that model.weights can't fit"
    pruning = channels.checkpoint is not None
    yield "channels.macs", pruning == (channels.macs is not None), "and channels.checkpoint need each other"
    yield "channels.macs", channels.macs is None or channels.macs > 0, "must be positive"
    yield "channels.lr_factor", channels.lr_factor > 0, "must be positive"
    yield "channels.checkpoint", not (pruning and targeted), "is for dense networks, and this one has target layers"
    yield "channels.checkpoint", not (pruning and thin), "and model.thin both make the network narrower: choose one"
    yield "channels.checkpoint", not (pruning and weights), "brings the weights that model.weights would"


def _rois_rules(config: DictConfig, targeted: bool) -> Iterator[tuple[str, bool, str]]:
    fixed = config.rois.checkpoint is not None
    yield "rois.places", fixed or config.rois.places == "learned", "has no effect without rois.checkpoint"
    yield "rois.checkpoint", targeted or not fixed, "is for targeted networks, and this one has no target layers"
    for key in ("l2", "share", "macs"):
        shrinks = fixed and config.penalty.get(key)
        yield f"penalty.{key}", not shrinks, "has no effect on the ROIs of rois.checkpoint: take penalty=none"


def model_title(config: DictConfig) -> str:
    """What tables call the network of a configuration, as far as that alone says."""
    return architecture_of(config, (1, 1, 1), 1).title


def architecture_of(config: DictConfig, input_size: tuple[int, int, int], num_outputs: int) -> Architecture:
    """The network that a configuration tells of, whole: before anything makes it narrower."""
    options = _options(config)
    name = options.pop("name")
    attention = config.attention
    return Architecture(
        name,
        input_size,
        num_outputs,
        {key: value for key, value in options.items() if key not in _TRAINING and value is not None},
        {
            **{"attention": attention.name, "scale_unit": attention.scale_unit, "min_size": attention.min_size},
            **other_than_plain(attention),
        },
    )


def check_rois(config: DictConfig) -> None:
    """Errors as of `start_network` for what `rois.checkpoint` names, but for the images' size and the outputs: those
    are known when the data are loaded."""
    if config.rois.checkpoint is not None:
        _read_rois(config, partial(architecture_of, config))


def _read_rois(
    config: DictConfig, architecture_for: Callable[[tuple[int, int, int], int], Architecture]
) -> dict[str, Any]:
    return read_rois(Path(config.rois.checkpoint).expanduser(), architecture_for, "rois.checkpoint=")


def start_network(
    config: DictConfig,
    input_size: tuple[int, int, int],
    num_outputs: int,
    checkpoint: Mapping[str, Any] | None = None,
) -> Start:
    """The network of a run, initialised from torch's random state, before its first step.

    checkpoint: that of a run which is continued or tested (see `read_checkpoint`): widths are then as there, and values
    are left to it. ValueError or OSError, one line each, for what the user can mend.
    """
    architecture = architecture_of(config, input_size, num_outputs)
    factory = config.model.get("factory")
    thin, weights = config.model.get("thin"), config.model.get("weights")
    pretrained: Collection[str] = ()
    rois: Mapping[str, Any] | None = None
    if checkpoint is not None:
        architecture = Architecture.from_dict(checkpoint["tkn"]["architecture"])
        model = architecture.build(factory=factory, **_execution(config))
        pretrained = checkpoint["tkn"].get("pretrained", ())
        rois = checkpoint["tkn"].get("rois")
        if rois is not None:
            freeze_rois_(model)
    elif config.channels.checkpoint is not None:
        path = Path(config.channels.checkpoint).expanduser()
        trained = read_checkpoint(path, architecture, "channels.checkpoint=")
        if trained["tkn"]["architecture"]["narrowed"] is not None:
            raise ValueError(
                f"channels.checkpoint={path} is of a network that is narrower already: name the whole one's run"
            )
        model, architecture = pruned_network(architecture, run_weights(trained), config.channels.macs, factory)
    elif thin is not None:
        model, architecture = thin_network(architecture, thin, factory)
    else:
        model = architecture.build(factory=factory, **_execution(config))
        if weights == "DEFAULT":
            found = default_weights(architecture.name, input_size, num_outputs, architecture.options)
            pretrained = fit_weights(model, found, "model.weights=DEFAULT")
        elif weights is not None:
            path = Path(weights).expanduser()
            pretrained = fit_weights(model, read_weights(path), f"model.weights={path}")
        _warn_of_window(architecture, pretrained)
        if config.rois.checkpoint is not None:
            rois = _take_rois(config, model, architecture, pretrained)
    frozen = as_patterns(_options(config).get("freeze"))
    if frozen:
        freeze_(model, frozen)
    return Start(model, architecture, pretrained, frozen, rois)


def _take_rois(
    config: DictConfig, model: nn.Module, architecture: Architecture, pretrained: Collection[str]
) -> dict[str, Any]:
    """Give `model` the ROIs of `rois.checkpoint`; returns where they are from."""
    path, places = config.rois.checkpoint, config.rois.places
    if attention_parameters(model) & set(pretrained):
        raise ValueError(f"rois.checkpoint={path} and model.weights={config.model.weights} both bring loc and scale")
    trained = _read_rois(config, lambda *_: architecture)
    fix_rois_(model, run_weights(trained), architecture.input_size, places=places, seed=config.seed)
    learned = trained["tkn"]["config"]
    return {
        "places": places,
        "checkpoint": path,
        "data": learned["data"]["name"],
        "epochs": learned["trainer"]["max_epochs"],
        "penalty": learned["penalty"],
    }


def _warn_of_window(architecture: Architecture, pretrained: Collection[str]) -> None:
    """Say so where dense weights meet windows that change what they compute."""
    name = architecture.attention["attention"]
    learned = any(parameter.rpartition(".")[2] == "loc" for parameter in pretrained)
    if pretrained and architecture.targeted and name != "flat" and not learned:
        _log.warning(
            "model.weights were trained without windows; attention=%s changes what they compute: take attention=flat",
            name,
        )


def _execution(config: DictConfig) -> dict[str, Any]:
    """How the target layers compute in this run."""
    # The compiler joins dense layers with what is around them, which most networks gain more by.
    compiled = config.trainer.compile and config.engine == "auto"
    return {"clip": config.attention.clip, "engine": "dense" if compiled else config.engine}


def _options(config: DictConfig) -> dict[str, Any]:
    options: dict[str, Any] = OmegaConf.to_container(config.model, resolve=True)  # type: ignore[assignment]
    return options
