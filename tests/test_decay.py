"""Parameter groups for optimisers: what weight decay leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tkn import AttentiveRegularization2d, TargetConv1d, TargetConv2d, build_model, parameter_groups, targetize


class Named(nn.Module):
    """As timm's models: it names parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 2, 4, 4))
        self.conv = TargetConv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.rho = AttentiveRegularization2d(3, attention="gaussian", learn_rho=True)
        self.head = nn.Linear(3, 2)

    def no_weight_decay(self) -> set[str]:
        return {"position"}


ATTENTION = {"conv.loc", "conv.scale", "rho.loc", "rho.scale", "rho.rho"}
VECTORS = {"conv.bias", "norm.weight", "norm.bias", "head.bias"}
REST = {"conv.weight", "head.weight"}


def names(model: nn.Module, group: dict[str, object]) -> set[str]:
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {of[id(parameter)] for parameter in group["params"]}


@pytest.mark.parametrize("decay_biases_and_norms", [True, False])
def test_attention_and_what_the_model_names_has_no_decay(decay_biases_and_norms: bool) -> None:
    model = Named()
    groups = parameter_groups(model, 0.1, decay_biases_and_norms=decay_biases_and_norms)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    with_decay, without = (names(model, group) for group in groups)
    assert with_decay == (REST | VECTORS if decay_biases_and_norms else REST)
    assert without == ATTENTION | {"position"} | (set() if decay_biases_and_norms else VECTORS)


@pytest.mark.parametrize("weight_decay", [0.5, 0])
def test_every_parameter_comes_once_and_decays_as_said(weight_decay: float) -> None:
    torch.manual_seed(0)
    model = targetize(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)))
    groups = parameter_groups(model, weight_decay)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.SGD(groups, lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for name, parameter in model.named_parameters():
        left = 1 if name.endswith(("loc", "scale")) else 1 - weight_decay
        torch.testing.assert_close(parameter, left * before[name])


def test_groups_without_parameters_are_left_out() -> None:
    (only,) = parameter_groups(build_model("dn10", (1, 8, 8), 2), 0.1)
    assert only["weight_decay"] == 0.1
    (only,) = parameter_groups(AttentiveRegularization2d(3), 0.1)
    assert only["weight_decay"] == 0.0
    assert len(only["params"]) == 2


def test_a_model_inside_another() -> None:
    """The outer one has no names of the inner one's."""
    model = nn.Sequential(targetize(nn.Sequential(nn.Conv1d(1, 2, 3))), TargetConv1d(2, 2, 3, bias=False))
    assert not hasattr(model, "no_weight_decay")
    without = names(model, parameter_groups(model, 0.1)[1])
    assert without == {"0.0.loc", "0.0.scale", "1.loc", "1.scale"}


def test_a_rate_of_their_own_for_loc_and_scale() -> None:
    model = Named()
    with_decay, without, attention = parameter_groups(model, 0.1, attention_lr=0.5)
    assert [names(model, group) for group in (with_decay, without, attention)] == [
        REST | VECTORS,
        {"position"},
        ATTENTION,
    ]
    optimiser = torch.optim.SGD([with_decay, without, attention], lr=0.01)
    assert [group["lr"] for group in optimiser.param_groups] == [0.01, 0.01, 0.5]
    dense = parameter_groups(nn.Linear(1, 1), 0.1, attention_lr=0.5)
    assert [group.get("lr") for group in dense] == [None]
    with pytest.raises(ValueError, match=r"attention_lr=-0\.5 must not be negative"):
        parameter_groups(model, 0.1, attention_lr=-0.5)


def test_a_negative_decay() -> None:
    with pytest.raises(ValueError, match=r"weight_decay=-0\.1 must not be negative"):
        parameter_groups(nn.Linear(1, 1), -0.1)
