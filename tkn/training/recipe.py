"""Optimisers and learning rates (Sec. 4.2)."""

from __future__ import annotations

import inspect
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from tkn.layers import roi_layers
from tkn.suggest import unknown

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
}

#: How many times torch's weight_decay (lambda / 2 * sum w^2) another library's penalty is; Keras: lambda * sum w^2.
WEIGHT_DECAY_FACTOR = {"torch": 1.0, "keras": 2.0}


def check_optimizer(options: dict[str, Any]) -> None:
    """ValueError for an unknown optimiser or an argument that it does not take."""
    name = options.get("name")
    if name not in OPTIMIZERS:
        raise ValueError(unknown("recipe.optimizer.name", name, OPTIMIZERS))
    accepted = set(inspect.signature(OPTIMIZERS[name]).parameters) - {"params"}
    for key in options:
        if key != "name" and key not in accepted:
            raise ValueError(unknown(f"argument of {name}: recipe.optimizer", key, accepted))


def build_optimizer(model: nn.Module, options: dict[str, Any], weight_decay_as: str) -> Optimizer:
    """The optimiser `options["name"]` with the other options as its arguments.

    `loc`, `scale` and a learned `rho` form a second group without weight decay: the scale penalty is theirs.
    """
    check_optimizer(options)
    arguments = {key: value for key, value in options.items() if key != "name"}
    if arguments.get("weight_decay"):
        arguments["weight_decay"] *= WEIGHT_DECAY_FACTOR[weight_decay_as]
    attention = {
        id(parameter)
        for layer in roi_layers(model).values()
        for name, parameter in layer.named_parameters(recurse=False)
        if name in ("loc", "scale", "rho")
    }
    groups = [{"params": [p for p in model.parameters() if id(p) not in attention]}]
    if attention:
        groups.append({"params": [p for p in model.parameters() if id(p) in attention], "weight_decay": 0.0})  # type: ignore[dict-item]
    return OPTIMIZERS[options["name"]](groups, **arguments)


def build_schedule(optimizer: Optimizer, epochs: int, drops: list[float], factor: float) -> LRScheduler:
    """The rate times `factor` at each of `drops`, fractions of the run's `epochs`; stepped once an epoch.

    A fraction that falls within an epoch takes effect after it: the first epoch always has the full rate.
    """
    milestones = [ceil(round(drop * epochs, 6)) for drop in drops]
    return LambdaLR(optimizer, lambda epoch: factor ** sum(epoch >= milestone for milestone in milestones))
