"""The dense network of a targeted one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tkn.convert import targetize
from tkn.layers import AttentiveRegularization2d, roi_layers
from tkn.macs import count_macs
from tkn.models import build_model
from tkn.models.dense import densified


@pytest.mark.parametrize(("targeted", "dense", "size"), [("tkn6", "cnn6", (1, 28, 28)), ("tdn10", "dn10", (1, 28, 28))])
def test_the_papers_networks(targeted: str, dense: str, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model, plain = build_model(targeted, size, 10).eval(), build_model(dense, size, 10).eval()
    made = densified(model)
    assert count_macs(made, size).total_dense == count_macs(plain, size).total_dense
    assert [type(module) for module in made.modules()] == [type(module) for module in plain.modules()]
    plain.load_state_dict(made.state_dict())
    x = torch.rand(2, *size)
    torch.testing.assert_close(made(x), plain(x))
    assert roi_layers(model)  # it is left as it was


def test_a_converted_network_with_a_regularization() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten())
    model = targetize(plain)
    model.insert(3, AttentiveRegularization2d(2))  # type: ignore[operator]
    made = densified(model)
    x = torch.rand(2, 1, 6, 6)
    torch.testing.assert_close(made(x), plain(x))
    assert not roi_layers(made)
    assert not hasattr(made, "no_weight_decay")
    assert type(densified(AttentiveRegularization2d(2))) is nn.Identity
