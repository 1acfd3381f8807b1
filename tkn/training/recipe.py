"""Optimisers and learning rates: the paper's (Sec. 4.2), and later ones."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from math import ceil, cos, pi
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from tkn.app.messages import unknown
from tkn.decay import attention_parameters

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
    model: nn.Module,
    options: dict[str, Any],
    weight_decay_as: str,
    attention_lr_factor: float = 1.0,
    pretrained: Collection[str] = (),
    pretrained_lr_factor: float = 1.0,
) -> Optimizer:
    """The optimiser `options["name"]` with the other options as its arguments, for the parameters that learn.

    The first group has the recipe's rate. `loc`, `scale` and a learned `rho` form a second group with
    `attention_lr_factor` times the rate and without weight decay: the scale penalty is theirs. The other parameters
    that `pretrained` names form one with `pretrained_lr_factor` times the rate, unless that is 1.
    """
    check_optimizer(options)
    arguments = {key: value for key, value in options.items() if key != "name"}
    if arguments.get("weight_decay"):
        arguments["weight_decay"] *= WEIGHT_DECAY_FACTOR[weight_decay_as]
    attention = attention_parameters(model)
    slower = set() if pretrained_lr_factor == 1 else set(pretrained) - attention
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in learning.items() if name not in attention | slower], "factor": 1.0},
        {"params": [p for name, p in learning.items() if name in attention], "factor": attention_lr_factor},
        {"params": [p for name, p in learning.items() if name in slower], "factor": pretrained_lr_factor},
    ]
    groups[1]["weight_decay"] = 0.0
    factors = [group.pop("factor") for group in groups]
    # The first one stays, for its rate is the one that is logged.
    kept = [position for position, group in enumerate(groups) if group["params"] or position == 0]
    optimizer = OPTIMIZERS[options["name"]]([groups[position] for position in kept], **arguments)
    for group, position in zip(optimizer.param_groups, kept, strict=True):
        group["lr"] *= factors[position]
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
