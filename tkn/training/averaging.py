"""Weight averaging: a network that follows the one that learns."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def average(model: nn.Module, raw: nn.Module, decay: float, steps: int) -> None:
    """Move `model`, the exponential moving average, towards `raw` after the optimiser's step number `steps` (from 1).

    All floating-point parameters and buffers, batch normalisation's running means among them, become `decay` of their
    own and 1 - `decay` of raw's; the others are raw's. In the first steps the decay is smaller, (1 + steps) /
    (10 + steps), so that the random start is soon forgotten. loc and scale stay valid: valid ones form a convex
    set.
    """
    weight = 1 - min(decay, (1 + steps) / (10 + steps))
    sources = raw.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(sources[name], weight)
        else:
            value.copy_(sources[name])
