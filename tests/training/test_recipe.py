"""Optimisers, their parameter groups and the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi
from typing import Any

import pytest
import torch

from tkn import build_model
from tkn.cli import compose
from tkn.layers import roi_layers
from tkn.training.recipe import build_optimizer, build_schedule

SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}


def test_loc_and_scale_are_outside_weight_decay() -> None:
    model = build_model("tdn10", (1, 28, 28), 10)
    optimizer = build_optimizer(model, SGD, "torch")
    decayed, attention = optimizer.param_groups
    assert (decayed["weight_decay"], attention["weight_decay"]) == (1e-4, 0)
    assert len(attention["params"]) == 12
    expected = {id(p) for layer in roi_layers(model).values() for p in (layer.loc, layer.scale)}
    assert {id(p) for p in attention["params"]} == expected
    assert len(decayed["params"]) + 12 == len(list(model.parameters()))
    assert attention["lr"] == 0.1
    assert attention["nesterov"]


def test_a_step_without_gradient_decays_weights_alone() -> None:
    model = build_model("tkn6", (1, 12, 12), 10)
    optimizer = build_optimizer(model, SGD, "torch")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.0 if name.endswith(("loc", "scale")) else 0.1 * 1e-4 * 1.9  # Nesterov's first step: 1 + momentum
        torch.testing.assert_close(parameter, before[name] * (1 - decay), rtol=1e-6, atol=0)


def test_keras_weight_decay_is_twice_as_strong() -> None:
    optimizer = build_optimizer(build_model("dn10", (1, 28, 28), 10), SGD, "keras")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [2e-4]


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (20, [0.1] * 10 + [0.01] * 5 + [0.001] * 5),
        (4, [0.1, 0.1, 0.01, 0.001]),
        (3, [0.1, 0.1, 0.01]),
        (2, [0.1, 0.01]),
        (1, [0.1]),
    ],
)
def test_schedule_drops_at_fractions_of_the_run(epochs: int, expected: list[float]) -> None:
    optimizer = build_optimizer(build_model("dn10", (1, 28, 28), 10), SGD, "torch")
    rates = _rates(optimizer, compose("data=mnist").recipe, epochs, epoch_steps=3)
    assert rates == pytest.approx([rate for rate in expected for _ in range(3)])


def test_warmup_and_cosine() -> None:
    optimizer = build_optimizer(build_model("tdn10", (1, 28, 28), 10), SGD, "torch", attention_lr_factor=0.5)
    recipe = {**compose("data=mnist").recipe, "lr_schedule": "cosine", "warmup": 0.2}
    rates = _rates(optimizer, recipe, epochs=5, epoch_steps=4)
    assert rates[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert rates[4:] == pytest.approx([0.05 * (1 + cos(pi * step / 16)) for step in range(16)])
    weights, attention = optimizer.param_groups
    assert attention["initial_lr"] == weights["initial_lr"] / 2
    assert weights["lr"] == attention["lr"] == 0  # after the last step


def _rates(optimizer: torch.optim.Optimizer, recipe: Mapping[str, Any], epochs: int, epoch_steps: int) -> list[float]:
    """The first group's rate in every step."""
    schedule = build_schedule(optimizer, recipe, epochs, epoch_steps)
    rates = []
    for _ in range(epochs * epoch_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates
