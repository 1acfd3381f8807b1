"""Optimisers and learning rates: the paper's (Sec. 4.2), and later ones."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import ceil, cos, pi
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from tkn.app.messages import unknown
from tkn.layers import roi_layers

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
}

#: "drops": divided at parts of the run (Sec. 4.2); "cosine": down to zero along half a cosine.
LR_SCHEDULES = ("drops", "cosine")
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


def build_optimizer(
    model: nn.Module, options: dict[str, Any], weight_decay_as: str, attention_lr_factor: float = 1.0
) -> Optimizer:
    """The optimiser `options["name"]` with the other options as its arguments.

    `loc`, `scale` and a learned `rho` form a second group with `attention_lr_factor` times the rate and without weight
    decay: the scale penalty is theirs.
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
    optimizer = OPTIMIZERS[options["name"]](groups, **arguments)
    for group in optimizer.param_groups[1:]:
        group["lr"] *= attention_lr_factor
    return optimizer


def build_schedule(optimizer: Optimizer, recipe: Mapping[str, Any], epochs: int, epoch_steps: int) -> LRScheduler:
    """The rate's course over the run of `epochs` times `epoch_steps` steps; stepped after every step.

    Over the run's first part, `warmup`, the rate rises linearly. Then, by `lr_schedule`, it either is multiplied by
    `lr_factor` at each of `lr_drops`, fractions of the run ("drops"; a fraction that falls within an epoch takes effect
    after it, so the first epoch has no drop), or falls to zero along half a cosine ("cosine").

    Every rate follows from the step alone: a run can be continued with another schedule, of which a checkpoint holds
    nothing. torch's LinearLR, MultiStepLR and CosineAnnealingLR in a SequentialLR each change the rate before, and
    load the schedule that they were saved with.
    """
    total = epochs * epoch_steps
    warmup = round(recipe["warmup"] * total)
    milestones = [ceil(round(drop * epochs, 6)) for drop in recipe["lr_drops"]]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if recipe["lr_schedule"] == "cosine":
            return (1 + cos(pi * (step - warmup) / (total - warmup))) / 2
        return recipe["lr_factor"] ** sum(step // epoch_steps >= milestone for milestone in milestones)

    return LambdaLR(optimizer, factor)
