"""`tkn.slide` with a plan, which knows the window's size."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

import tkn
from tkn.layers import roi_layers


def test_a_plan_over_every_window() -> None:
    torch.manual_seed(0)
    model = tkn.build_model("tdn10", (1, 12, 12), 3).eval()
    for layer in roi_layers(model).values():
        nn.init.uniform_(layer.loc, 0.2, 0.8)
        nn.init.uniform_(layer.scale, 0.2, 0.6)
    plan = tkn.accelerate(model, 8, (1, 12, 12))
    image = torch.rand(1, 20, 24)
    found = tkn.slide(plan, image, 4)
    assert found.scores.shape == (3, 3, 4)
    with torch.no_grad():
        for row, column in product(range(3), range(4)):
            crop = image[None, :, 4 * row : 4 * row + 12, 4 * column : 4 * column + 12]
            torch.testing.assert_close(found.scores[:, row, column], model(crop)[0], rtol=1e-4, atol=1e-4)
    for options, message in (({"window": 10}, "not the plan's"), ({"batch_size": 0}, "batch_size=0")):
        with pytest.raises(ValueError, match=message):
            tkn.slide(plan, image, 4, **options)
    with pytest.raises(ValueError, match="1 channels, not of 3"):
        tkn.slide(plan, torch.rand(3, 20, 24), 4)
