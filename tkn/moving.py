"""Bounds of ROIs that move on a GPU: kept, a little larger than the ROIs, until one leaves them."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tkn.kept import Kept
from tkn.roi import roi_areas, roi_bounds

#: Pixels by which bounds are larger on every side while the ROIs learn.
MARGIN = 1
#: ROIs of less than this part of the area they had when the bounds were made get new ones.
_SHRUNK = 0.9

#: By the place of loc and scale in memory; what is kept for a place is compared with what lies there now. A state
#: counts as one byte: so many are kept.
_known = Kept(1024)


@dataclass(frozen=True, eq=False)
class Outer:
    """Bounds that hold all ROIs: int64 [O, 2, 2] on the device and as bytes, their pixels and those of the ROIs."""

    rois: Tensor
    key: bytes
    area: int
    area_inside: int


class _Checked(threading.local):
    """What was found to hold within the present call of an operator; None outside of one."""

    places: dict[Hashable, Outer] | None = None


_checked = _Checked()


@contextmanager
def checked_once() -> Iterator[None]:
    """Within the context, in this thread, loc and scale stay: bounds are compared with them once."""
    before, _checked.places = _checked.places, {}
    try:
        yield
    finally:
        _checked.places = before


def outer_bounds(size: tuple[int, ...], loc: Tensor, scale: Tensor, *, margin: int) -> Outer:
    """Bounds of the ROIs on maps of `size`, the same object again while they hold. Waits for the device once, for a
    number, or twice where new ones are made."""
    place = (loc.device, loc.data_ptr(), scale.data_ptr(), tuple(loc.shape), size, margin)
    within = _checked.places
    if within is not None and place in within:
        return within[place]
    rois = roi_bounds(size, loc, scale)
    known = _known.find(place)
    if not isinstance(known, Outer) or not bool(holds(rois, known)):
        known = _made(size, rois, margin)
        _known.put(place, known, 1)
    if within is not None:
        within[place] = known
    return known


def holds(rois: Tensor, outer: Outer) -> Tensor:
    """Whether all ROIs, int64 [O, dims, 2], lie in the bounds, and are not much smaller: bool, on the device."""
    lo, hi = rois.unbind(-1)
    outer_lo, outer_hi = outer.rois.unbind(-1)
    within = ((lo >= outer_lo) & (hi <= outer_hi)) | (hi <= lo)
    return within.all() & (roi_areas(rois).sum() >= int(_SHRUNK * outer.area_inside))


def _made(size: tuple[int, ...], rois: Tensor, margin: int) -> Outer:
    inside = rois.cpu()
    lo, hi = inside.unbind(-1)
    length = torch.tensor(size)
    empty = (hi <= lo).any(dim=1, keepdim=True)
    wide_lo = torch.where(empty, lo, (lo - margin).clamp(min=0))
    wide_hi = torch.where(empty, lo, torch.minimum(hi + margin, length))
    wide = torch.stack((wide_lo, wide_hi), dim=-1)
    areas = int(roi_areas(wide).sum()), int(roi_areas(inside).sum())
    return Outer(wide.to(rois.device), wide.numpy().tobytes(), *areas)
