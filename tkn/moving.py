"""Bounds of ROIs that move on a GPU: kept, a little larger than the ROIs, until one leaves them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(eq=False)
class Followed:
    """ROIs that a captured program was captured for, and the bounds that it computes in."""

    size: tuple[int, ...]
    loc: Tensor
    scale: Tensor
    margin: int
    outer: Outer
    #: of the bounds, in tensors that stay where they are: int64 [O, dims, 2], and the least pixels of all ROIs; made
    #: when all is captured, for a graph would write into them what they were
    rois: Tensor | None = None
    least: Tensor | None = None


@dataclass
class Record:
    """What a program depends on beside its tensors, noted while it is captured."""

    bounds: dict[Hashable, Followed] = field(default_factory=dict)
    #: by key: a backend's lists, in the order of their use, and how it makes them anew: whether they fit
    lists: dict[Hashable, Any] = field(default_factory=dict)
    refill: Callable[[Record], bool] | None = None
    #: the choices between engines
    choices: list[Any] = field(default_factory=list)


class NotPrepared(RuntimeError):
    """What a program needs in order to be captured was not made by a pass before."""


class _Here(threading.local):
    """Of this thread: what was found to hold within the present call of an operator, and what is being recorded."""

    places: dict[Hashable, Outer] | None = None
    record: Record | None = None


_here = _Here()
#: One entry for each time that bounds did no longer hold.
_remade: list[Hashable] = []


@contextmanager
def checked_once() -> Iterator[None]:
    """Within the context, in this thread, loc and scale stay: bounds are compared with them once."""
    before = _here.places
    _here.places = {} if before is None else before
    try:
        yield
    finally:
        _here.places = before


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Within the context, in this thread, a program is captured: nothing waits for the device, what was known before is
    taken as it is and noted. `NotPrepared` if something was not known."""
    before, _here.record = _here.record, record
    try:
        yield
    finally:
        _here.record = before


def record_here() -> Record | None:
    """What is being recorded in this thread."""
    return _here.record


def remade_count() -> int:
    """How often bounds with a margin did no longer hold, of all layers since this process began."""
    return len(_remade)


def outer_bounds(size: tuple[int, ...], loc: Tensor, scale: Tensor, *, margin: int) -> Outer:
    """Bounds of the ROIs on maps of `size`, the same object again while they hold. Waits for the device once, for a
    number, or twice where new ones are made."""
    place = (loc.device, loc.data_ptr(), scale.data_ptr(), tuple(loc.shape), size, margin)
    known = _known.find(place)
    assert known is None or isinstance(known, Outer)
    if _here.record is not None:
        if known is None:
            raise NotPrepared
        if place not in _here.record.bounds:
            _here.record.bounds[place] = Followed(size, loc.detach(), scale.detach(), margin, known)
        return known
    if _here.places is not None and place in _here.places:
        return _here.places[place]
    # Not tensors of inference mode: what is kept is written into later.
    with torch.inference_mode(False), torch.no_grad():
        rois = roi_bounds(size, loc, scale)
        if known is None or not bool(hold(rois, known.rois, _least(known))):
            if known is not None and margin:
                _remade.append(place)
            known = _made(size, rois, margin)
            _known.put(place, known, 1)
    if _here.places is not None:
        _here.places[place] = known
    return known


def _least(outer: Outer) -> Tensor:
    return torch.full((), int(_SHRUNK * outer.area_inside), dtype=torch.int64, device=outer.rois.device)


def hold(rois: Tensor, outer: Tensor, least: Tensor) -> Tensor:
    """Whether all `rois` lie in `outer`, both int64 [O, dims, 2], and have `least` pixels: bool, on the device."""
    lo, hi = rois.unbind(-1)
    outer_lo, outer_hi = outer.unbind(-1)
    within = ((lo >= outer_lo) & (hi <= outer_hi)) | (hi <= lo).any(dim=1, keepdim=True)
    return within.all() & (roi_areas(rois).sum() >= least)


def all_hold(record: Record) -> Tensor:
    """Whether all bounds of a captured program hold now: bool, on the device; there must be some."""
    found = []
    for followed in record.bounds.values():
        assert followed.rois is not None and followed.least is not None
        found.append(hold(roi_bounds(followed.size, followed.loc, followed.scale), followed.rois, followed.least))
    return torch.stack(found).all()


def settle(record: Record) -> None:
    """Give what was recorded its tensors, when nothing is captured any more."""
    for followed in record.bounds.values():
        followed.rois, followed.least = followed.outer.rois.clone(), _least(followed.outer)


def renew(record: Record) -> None:
    """Write the bounds that hold now into the record's tensors."""
    for followed in record.bounds.values():
        outer = outer_bounds(followed.size, followed.loc, followed.scale, margin=followed.margin)
        assert followed.rois is not None and followed.least is not None
        followed.outer = outer
        followed.rois.copy_(outer.rois)
        followed.least.copy_(_least(outer))


def _made(size: tuple[int, ...], rois: Tensor, margin: int) -> Outer:
    inside = rois.cpu()
    lo, hi = inside.unbind(-1)
    length = torch.tensor(size, device="cpu")
    empty = (hi <= lo).any(dim=1, keepdim=True)
    wide_lo = torch.where(empty, lo, (lo - margin).clamp(min=0))
    wide_hi = torch.where(empty, lo, torch.minimum(hi + margin, length))
    wide = torch.stack((wide_lo, wide_hi), dim=-1)
    areas = int(roi_areas(wide).sum()), int(roi_areas(inside).sum())
    return Outer(wide.to(rois.device), wide.numpy().tobytes(), *areas)
