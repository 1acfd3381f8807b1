"""Threads change nothing, to the bit, as long as the tiles are the same."""

from __future__ import annotations

import pytest
import torch
from engine_cases import results, same_with_threads, targeted
from torch import Tensor, nn

from tkn import TargetConv2d
from tkn.sequential import TargetSequential


# Between, one thread takes larger tiles than two.
@pytest.mark.parametrize("batch", [1, 5, 8, 128])
@pytest.mark.parametrize("inputs", [2, 18])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients(batch: int, inputs: int, autocast: bool) -> None:
    torch.manual_seed(0)
    chain = TargetSequential(
        TargetConv2d(inputs, 40, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), TargetConv2d(40, 6, 3, padding=1), nn.ReLU()
    )
    targeted(chain, seed=1, engine="roi")
    x = torch.randn(batch, inputs, 9, 8)

    def compute() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return results(chain, x)

    same_with_threads(compute)


def test_many_inputs_are_summed_in_one_order() -> None:
    """Where what a pixel reads does not fit into a cache."""
    torch.manual_seed(0)
    layer = targeted(TargetConv2d(200, 4, 5, padding=2, engine="roi"), seed=1)
    x = torch.randn(8, 200, 6, 6)
    same_with_threads(lambda: [layer(x).detach()])
