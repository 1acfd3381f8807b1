"""Weight averaging: a network that follows the one that learns."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """Makes `model` the exponential moving average of `raw`, of the same architecture, in place.

    The tensors of both are found once: afterwards they must stay where they are. `copied` names tensors that are not
    averaged but become raw's.

    The arithmetic is torch's. Its AveragedModel would begin with a copy of the first step's network, average batch
    normalisation's counts too, and rename the tensors in checkpoints. Lightning's callback for it (from 2.6 on) swaps
    the networks' values for every evaluation; here both are there in every step, to be counted, drawn and saved.
    """

    def __init__(self, model: nn.Module, raw: nn.Module, decay: float, copied: Container[str] = ()) -> None:
        self.decay = decay
        self.averages, self.values = [], []
        self.copied = []
        theirs = raw.state_dict()
        for name, mine in model.state_dict().items():
            if name in copied or not mine.is_floating_point():
                self.copied.append((mine, theirs[name]))
            else:
                self.averages.append(mine)
                self.values.append(theirs[name])

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """After the optimiser's step number `steps`, which count from 1.

        All floating-point parameters and buffers, batch normalisation's running means among them, become `decay` of
        their own and 1 - `decay` of raw's; the others, and those to be copied, become raw's. In the first steps the
        decay is smaller, (1 + steps) / (10 + steps), so that the random start is soon forgotten. Valid loc and scale
        stay valid, for they form a convex set.
        """
        for mine, theirs in self.copied:
            mine.copy_(theirs)
        get_ema_multi_avg_fn(min(self.decay, (1 + steps) / (10 + steps)))(self.averages, self.values, steps)
