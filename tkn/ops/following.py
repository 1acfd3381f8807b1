"""Captured programs of target layers whose ROIs move: whether they still hold, and how they are made to hold again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tkn.moving import Record, all_hold, checked_once, recording, renew, settle


class Following:
    """What a captured program was captured for.

    It computes in bounds a little larger than the ROIs, from lists that were made for these. `check`, after each change
    of the ROIs, lets the device look whether they have left the bounds; `left` says so, before the program runs again;
    `remake` makes the lists anew in their place.
    """

    def __init__(self) -> None:
        self.record = Record()
        self.flag: Tensor | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the context a program is captured. `NotPrepared` if no pass before made what it needs."""
        self.record, self.flag = Record(), None
        with recording(self.record):
            yield
        settle(self.record)
        if self.record.bounds:
            device = next(iter(self.record.bounds.values())).loc.device
            self.flag = torch.zeros((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def check(self) -> None:
        """Look whether the ROIs lie in the bounds. Nothing waits for the device; a graph may capture this."""
        if self.flag is not None:
            self.flag.copy_(all_hold(self.record).logical_not())

    def left(self) -> bool:
        """Whether ROIs had left their bounds at the last check. Waits for the device."""
        return self.flag is not None and bool(self.flag)

    @torch.no_grad()
    def remake(self) -> bool:
        """Make the lists for the present ROIs. False if another program has to be captured: the lists have no place,
        or other engines are better now."""
        with checked_once():
            fits = self.record.refill is None or self.record.refill(self.record)
            if not fits:
                return False
            renew(self.record)
            self.check()
            return all(choice.stands() for choice in self.record.choices)
