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
    model: nn.Module,
    weight_decay: float,
    *,
    decay_biases_and_norms: bool = True,
    attention_lr: float | None = None,
) -> list[dict[str, Any]]:
    """All parameters of `model` as groups for a torch optimiser: with weight decay, without, and loc and scale.

    Without decay are loc, scale and rho of every ROI layer, the parameters that the model itself names in a method
    `no_weight_decay`, and with `decay_biases_and_norms=False` those of at most one dimension: biases, and the weights
    of normalisation layers. The groups come in this order; those without parameters are left out.

    `attention_lr`: the rate of loc, scale and rho, which are then a third group; for a network whose weights are
    trained already, and take a lower rate than ROIs that have yet to be found. By default they are in the second.
    ValueError if a number is negative.
    """
    for name, value in (("weight_decay", weight_decay), ("attention_lr", attention_lr)):
        if value is not None and value < 0:
            raise ValueError(f"{name}={value} must not be negative")
    attention, named = attention_parameters(model), own_exclusions(model)
    decaying, spared, of_attention = (weight_decay, None), (0.0, None), (0.0, attention_lr)
    groups: dict[tuple[float, float | None], list[nn.Parameter]] = {decaying: [], spared: [], of_attention: []}
    for name, parameter in model.named_parameters():
        if name in attention:
            kind = of_attention
        elif name in named or (parameter.dim() <= 1 and not decay_biases_and_norms):
            kind = spared
        else:
            kind = decaying
        groups[kind].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay} | ({} if lr is None else {"lr": lr})
        for (decay, lr), parameters in groups.items()
        if parameters
    ]


def own_exclusions(model: nn.Module) -> set[str]:
    """What the model's method `no_weight_decay` returns, the convention of timm; empty if it has none."""
    method = getattr(model, "no_weight_decay", None)
    return set(method()) if callable(method) else set()
