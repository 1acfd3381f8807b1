"""Weight averaging: a network that follows the one that learns."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """Makes `model` the exponential moving average of `raw`, of the same architecture, in place.

    The tensors of both are found once: afterwards they must stay where they are.

    The arithmetic is torch's. Its AveragedModel would begin with a copy of the first step's network, average batch
    normalisation's counts too, and rename the tensors in checkpoints. Lightning's callback for it (from 2.6 on) swaps
    the networks' values for every evaluation; here both are there in every step, to be counted, drawn and saved.
    """

    def __init__(self, model: nn.Module, raw: nn.Module, decay: float) -> None:
        self.decay = decay
        pairs = list(zip(model.state_dict().values(), raw.state_dict().values(), strict=True))
        self.counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        self.averages, self.values = list(averages), list(values)

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """After the optimiser's step number `steps`, which count from 1.

        All floating-point parameters and buffers, batch normalisation's running means among them, become `decay` of
        their own and 1 - `decay` of raw's; the others become raw's. In the first steps the decay is smaller,
        (1 + steps) / (10 + steps), so that the random start is soon forgotten. Valid loc and scale stay valid, for they
        form a convex set.
        """
        for mine, theirs in self.counts:
            mine.copy_(theirs)
        get_ema_multi_avg_fn(min(self.decay, (1 + steps) / (10 + steps)))(self.averages, self.values, steps)
