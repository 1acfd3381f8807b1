"""The exponential moving average of a network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tkn.training.averaging import MovingAverage


@pytest.mark.parametrize(("steps", "decay"), [(1, 2 / 11), (71, 72 / 81), (72, 73 / 82), (1000, 0.9)])
def test_closed_form(steps: int, decay: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    raw = copy.deepcopy(model)
    raw(torch.randn(8, 3))  # moves the running means
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = copy.deepcopy(model.state_dict())
    MovingAverage(model, raw, 0.9).update(steps)
    for name, value in model.state_dict().items():
        if name == "1.num_batches_tracked":
            assert value == 1
        else:
            torch.testing.assert_close(value, decay * before[name] + (1 - decay) * raw.state_dict()[name])
