"""Optimisers, their parameter groups and the schedule."""

from __future__ import annotations

import pytest
import torch

from tkn import build_model
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
    schedule = build_schedule(optimizer, epochs, [0.5, 0.75], 0.1)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)
