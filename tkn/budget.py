"""A budget of multiply-adds: ROIs shrink, step by step, until a network has just so many (docs/budget.md)."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from tkn.roi_count import RoiCount

#: How much of what was known of the kernels' worth a step forgets: about so many steps count.
_MEMORY = 50
#: No kernel shrinks so many times faster, or slower, than the median one.
_SPREAD = 10.0
#: Of kernels without gradients, which then shrink by their costs.
_NO_WORTH = 1e-30
#: Of the map's side: far less than a pixel.
_ASIDE = 1e-5
#: The mean over other images than those of the steps may be so many times the budget.
_OTHER_IMAGES = 1.02
#: The search for the shrinkage: so many rounds, each among so many values within the last one's bracket.
_ROUNDS, _VALUES = 7, 7


def asked_macs(dense: int, *, share: float | None = None, macs: float | None = None) -> int:
    """The multiply-adds that a budget asks for, of a network that has `dense`; ValueError unless it is one of both."""
    if share is None and macs is not None:
        return round(macs)
    if share is not None and macs is None:
        return round(share * dense)
    raise ValueError(f"a budget is either a share or macs, not share={share} and macs={macs}")


#: What a continued run needs.
_STATE = ("macs", "steps", "begun", "begun_macs", "done", "_worth", "_loc", "_scale")


class Budget:
    """Holds a network's multiply-adds to a plan that ends at the budget; for one's own training loop.

        budget = tkn.Budget(model, (3, 96, 96), share=0.3, steps=total_steps // 2)
        for images, labels in batches:
            loss_of(model(images), labels).backward()
            optimizer.step()
            budget.step()  # in place of the projection
            optimizer.zero_grad()

    Over the first `steps` steps the count falls geometrically from what it is to the budget; afterwards loc and scale
    stay as they are then. Within a step every scale is multiplied by exp(-mu * rate) with the one mu for which the
    count is the plan's, whatever the optimiser did before. A kernel's rate is sqrt(m / h): m is what it costs, its
    multiply-adds now, and h what it is worth, the mean square over the last steps of the loss's gradient by log(scale),
    which estimates how much the loss rises as it shrinks. Rates do not depend on the loss's scale, and hardly on the
    batch's size or the optimiser.

    Of adaptive layers the static ROIs shrink or grow, and the count is the mean over images of each step's batch. What
    finds their ROIs learns on, so they are held to the budget up to the last step.

    Args:
        model: a network with target layers, on any device, also moved after this. Layers whose scale does not learn
            (`requires_grad`) stay as they are.
        input_size: of an image, (C, H, W).
        share: of the multiply-adds of the dense network that `model` stands for; or
        macs: multiply-adds for one image.
        steps: the optimiser's steps after which the budget is met; may be set later.

    ValueError for a budget that ROIs can't reach: below the least (min_size ROIs everywhere), or above the most (whole
    maps); and for a network without target layers that learn, with mixtures, or with adaptive layers of frozen scales.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, ...],
        *,
        share: float | None = None,
        macs: float | None = None,
        steps: int = 1,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1: ROIs shrink in steps")
        self.count = RoiCount(model, input_size)
        asked = f"share={share}" if macs is None else f"macs={macs:g}"
        #: multiply-adds for one image that are asked for
        self.macs = asked_macs(self.count.dense, share=share, macs=macs)
        self._check(asked)
        self.steps = steps
        #: the step and the count at which the plan begins, and the steps done
        self.begun, self.begun_macs, self.done = 0, self.count.now, 0
        scale = self.count.scale()
        self._planned = torch.zeros((), dtype=torch.float64)
        self._worth = torch.zeros_like(scale, dtype=torch.float64)
        self._loc, self._scale = self.count.loc(), scale

    def _check(self, asked: str) -> None:
        dense, least, most = self.count.dense, self.count.least, self.count.most
        if self.macs > most:
            raise ValueError(f"{asked} is more than the {most} multiply-adds of ROIs that are whole maps")
        if self.macs < least:
            raise ValueError(
                f"{asked} of {dense} multiply-adds is less than the chosen layers can reach: the least is {least} "
                f"(share {least / dense:.3g}). {self.count.fixed} of these are in layers without learning ROIs, which "
                "model.layers=all (targetize(model, 'all')) targets too, the others in ROIs whose sides are the least, "
                "attention.min_size (targetize(model, min_size=)) pixels"
            )

    @property
    def met(self) -> bool:
        """Whether the steps are done: the ROIs stay, but for adaptive layers, and the count is the budget's."""
        return self.done >= self.steps

    @property
    def held(self) -> bool:
        """Whether the budget was met before this step, which the ROIs therefore leave as they were.

        Never of adaptive layers, whose ROIs move on with what finds them.
        """
        return self.done > self.steps and not self.count.of_images

    def allows(self, macs: float) -> bool:
        """Whether a network of so many multiply-adds meets the budget: of adaptive layers, in images other than those
        that they were held to it in."""
        return macs <= (_OTHER_IMAGES if self.count.of_images else 1.0) * self.macs

    def begin(self, done: int, steps: int) -> None:
        """Plan anew: from the count of now, after `done` steps of a run, to the budget after `steps` of it."""
        loc, scale = self.count.loc(), self.count.scale()
        self.to(scale.device)
        self.begun, self.done, self.steps = done, done, steps
        self.begun_macs = self.count.fixed + int(self.count.macs(loc, scale).sum())
        self._worth.zero_()
        self._loc.copy_(loc)
        self._scale.copy_(scale)

    def state_dict(self) -> dict[str, Any]:
        """All that a continued run needs, to come to the same bits: plain numbers and tensors."""
        return {name.lstrip("_"): getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the model's parameters are loaded by their own. ValueError for another budget's, or
        another network's."""
        if state.keys() != self.state_dict().keys() or any(
            state[name].shape != self._scale.shape for name in ("worth", "loc", "scale")
        ):
            raise ValueError("this is not the state of a budget of such a network")
        if state["macs"] != self.macs:
            raise ValueError(f"this is the state of a budget of {state['macs']} multiply-adds, not of {self.macs}")
        for name in _STATE:
            value = state[name.lstrip("_")]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)

    def planned(self) -> float:
        """Multiply-adds after the steps done."""
        least = 0.99 * self.count.least  # so that a budget at the very least has a logarithm
        part = min(1.0, (self.done - self.begun) / max(1, self.steps - self.begun))
        start, end = self.begun_macs - least, self.macs - least
        return least + start * (end / start) ** part if part < 1 else float(self.macs)

    def step(self) -> None:
        """After the optimiser's step, while the gradients are still there."""
        self.advance()
        self.apply()

    def advance(self) -> None:
        """The part of `step` on the host: which step it is."""
        self.to(self.count.layers[0].scale.device)
        self.done += 1
        self._planned.fill_(self.planned())

    def to(self, device: torch.device) -> None:
        """Compute on this device."""
        self.count.to(device)
        for name in ("_planned", "_worth", "_loc", "_scale"):
            setattr(self, name, getattr(self, name).to(device))

    @torch.no_grad()
    def apply(self) -> None:
        """The part of `step` on the device, which a CUDA graph can capture: one while shrinking, another when `met`."""
        if not self.held:
            self.count.see()
            self._shrink()
        self.count.set(self._loc, self._scale)

    def _shrink(self) -> None:
        count = self.count
        loc, scale = count.loc(), count.scale()
        # A ROI of min_size pixels whose ends fall on pixel centres has one pixel more, as where loc has not learned.
        loc = torch.where(loc == 0.5, 0.5 + _ASIDE, loc)
        gradient = count.scale_grad().double() * scale
        # An overflow of half precision is no gradient.
        self._worth.lerp_(gradient.square().nan_to_num(0, posinf=0), 1 / _MEMORY)
        rates = self.rates(loc, scale)

        def shrunk(mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """(loc, scale, multiply-adds by kernel) at each mu [V]: [V, dims, K] and [V, K]."""
            candidates = scale * torch.exp(-mu[:, None, None] * rates)
            there, that = count.projected(loc, candidates.to(scale.dtype))
            return there, that, count.macs(there, that)

        wanted = self._planned - count.fixed
        # Here every ROI is the least, or the whole map.
        far = torch.full_like(self._planned, _SPREAD * (1 - log(1e-4)))
        low, high = -far, far
        between = torch.arange(1, _VALUES + 1, device=scale.device, dtype=torch.float64) / (_VALUES + 1)
        for _ in range(_ROUNDS):
            values = low + (high - low) * between
            fits = shrunk(values)[2].sum(dim=1) <= wanted
            # The first that fits, and the one before it.
            first = _VALUES - fits.sum()
            edges = torch.cat((low[None], values, high[None]))
            low, high = edges.index_select(0, torch.stack((first, first + 1))).unbind()
        locs, scales, macs = shrunk(torch.stack((low, high)))
        # Between the two the count jumps, for ROIs are of whole pixels: the kernels of high rates go first.
        order = rates.mean(dim=0).argsort(descending=True, stable=True)
        saved = (macs[0] - macs[1])[order]
        goes = torch.empty_like(order, dtype=torch.bool)
        goes[order] = saved.cumsum(0) - saved < macs[0].sum() - wanted
        self._loc.copy_(torch.where(goes, locs[1], locs[0]))
        self._scale.copy_(torch.where(goes, scales[1], scales[0]))

    def rates(self, loc: Tensor, scale: Tensor) -> Tensor:
        """How fast each scale shrinks, as multiples of the median one: [dims, K]; 0 where nothing would be saved."""
        macs = self.count.macs(loc, scale)
        worth = self._worth + 1e-3 * self._worth.mean() + _NO_WORTH
        rates = (macs / worth).sqrt()
        rates = (rates / rates.median()).clamp(1 / _SPREAD, _SPREAD)
        return torch.where(macs > 0, rates, 0.0)
