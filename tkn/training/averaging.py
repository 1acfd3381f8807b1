"""Weight averaging: a network that follows the one that learns."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def average(model: nn.Module, raw: nn.Module, decay: float, steps: int) -> None:
    """Move `model`, the exponential moving average of `raw`, in place, after the optimiser's step number `steps`.

    Both are of one architecture; steps count from 1. All floating-point parameters and buffers, batch normalisation's
    running means among them, become `decay` of their own and 1 - `decay` of raw's; the others become raw's. In the
    first steps the decay is smaller, (1 + steps) / (10 + steps), so that the random start is soon forgotten. Valid loc
    and scale stay valid, for they form a convex set.
    """
    pairs = list(zip(model.state_dict().values(), raw.state_dict().values(), strict=True))
    for mine, theirs in pairs:
        if not mine.is_floating_point():
            mine.copy_(theirs)
    averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(list(averages), list(values), steps)
