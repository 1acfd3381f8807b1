"""Which parameters weight decay leaves alone: loc, scale and rho, for the scale penalty is theirs (Sec. 4.3)."""

from __future__ import annotations

from typing import Any

from torch import nn

from tkn.layers import roi_layers


def attention_parameters(model: nn.Module) -> set[str]:
    """The names of every loc, scale and learned rho in `model`, as in `model.named_parameters()`."""
    return {
        f"{layer}.{parameter}" if layer else parameter
        for layer, module in roi_layers(model).items()
        for parameter in module.no_weight_decay()
    }


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_biases_and_norms: bool = True
) -> list[dict[str, Any]]:
    """All parameters of `model` as groups for a torch optimiser, with and without weight decay.

    Without are loc, scale and rho of every ROI layer, the parameters that the model itself names in a method
    `no_weight_decay`, and with `decay_biases_and_norms=False` those of at most one dimension: biases, and the weights
    of normalisation layers. The group with decay comes first; a group without parameters is left out. ValueError if
    `weight_decay` is negative.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay} must not be negative")
    excluded = attention_parameters(model) | own_exclusions(model)
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        spared = name in excluded or (parameter.dim() <= 1 and not decay_biases_and_norms)
        groups[0.0 if spared else weight_decay].append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters]


def own_exclusions(model: nn.Module) -> set[str]:
    """What the model's method `no_weight_decay` returns, the convention of timm; empty if it has none."""
    method = getattr(model, "no_weight_decay", None)
    return set(method()) if callable(method) else set()
