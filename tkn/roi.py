"""Regions of interest: from loc and scale to rectangles of pixels (Eq. 15), and the limits that keep them valid."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from tkn.attention import at_least_float32


def roi_bounds(size: tuple[int, ...], loc: Tensor, scale: Tensor) -> Tensor:
    """The pixels inside every kernel's ROI (Eq. 15), half-open, cut to the map.

    Along each axis the ROI is the interval [(loc - scale / sqrt 2) L, (loc + scale / sqrt 2) L]; a pixel is inside if
    its centre i + 0.5 is. `size`: the map's spatial size; `loc`, `scale`: [dims, C], fractions of the map's side.
    Returns int64 [C, dims, 2] with (lo, hi) last. NaN in loc or scale, or a negative scale, makes a ROI empty: lo = hi.
    """
    device = loc.device
    if device.type == "mps":  # which has no float64
        loc, scale = loc.cpu(), scale.cpu()
    # float64: in float32 a bound that falls on a pixel's centre would be decided by rounding.
    loc, half = loc.detach().double(), scale.detach().double() / sqrt(2)
    # `length` stays a number: a tensor made of it here would have to be copied to a GPU, in every step.
    bounds = [torch.stack(axis_bounds(length, loc[axis], half[axis]), dim=-1) for axis, length in enumerate(size)]
    return torch.stack(bounds, dim=1).long().to(device)


def axis_bounds(length: int | Tensor, loc: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """(lo, hi), half-open, of the pixels inside loc - half to loc + half along axes of `length` pixels; float64."""
    lo = torch.ceil((loc - half) * length - 0.5).clamp(min=0).clamp(max=length)
    hi = (torch.floor((loc + half) * length - 0.5) + 1).clamp(min=0).clamp(max=length)
    # A NaN (of a diverged network) makes an empty ROI: as an integer it would point far outside of the map.
    lo, hi = lo.nan_to_num(0), hi.nan_to_num(0)
    return lo, hi.maximum(lo)


def roi_mask(size: tuple[int, ...], rois: Tensor) -> Tensor:
    """True inside each ROI: int64 [C, dims, 2] -> bool [C, *size]."""
    mask = torch.ones((len(rois),) + (1,) * len(size), dtype=torch.bool, device=rois.device)
    for axis, length in enumerate(size):
        pixel = torch.arange(length, device=rois.device)
        inside = (pixel >= rois[:, axis, :1]) & (pixel < rois[:, axis, 1:])
        mask = mask & inside.reshape(-1, *(1,) * axis, length, *(1,) * (len(size) - axis - 1))
    return mask


def roi_areas(rois: Tensor) -> Tensor:
    """Pixels in each ROI: int64 [C, dims, 2] -> int64 [C]."""
    return (rois[..., 1] - rois[..., 0]).prod(dim=1)


@torch.no_grad()
def project_(size: tuple[int, ...], loc: Tensor, scale: Tensor, min_size: tuple[int, ...]) -> None:
    """Clip loc and scale [dims, C] in place so that every ROI keeps `min_size` pixels per axis (Sec. 3.5).

    scale is held in [min_size / (sqrt 2 L), 1]: a ROI's side is at least min_size pixels. loc is held so that at least
    min_size pixels of the ROI lie inside the map. A min_size larger than the map means the whole map. In half precision
    the limits are narrower by what rounding may cost. NaN stays NaN.
    """
    for axis, (length, wanted) in enumerate(zip(size, min_size, strict=True)):
        least = min(wanted, length)
        kept = at_least_float32(scale[axis]).clamp(min=least_scale(least, length, scale.dtype), max=1)
        scale[axis].copy_(kept)
        loc[axis].copy_(
            projected_loc(at_least_float32(loc[axis]), at_least_float32(scale[axis]), least / length, loc.dtype)
        )


def least_scale(least: int, length: int, dtype: torch.dtype) -> float:
    """The scale, stored as `dtype`, of ROIs whose side is `least` pixels on an axis of `length`."""
    # A little more than the bound: rounding must not push two centres out of a ROI that just holds them.
    return least / (sqrt(2) * length) * (1 + max(1e-6, torch.finfo(dtype).eps))


def projected_loc(loc: Tensor, scale: Tensor, least: float | Tensor, dtype: torch.dtype) -> Tensor:
    """loc, to be stored as `dtype`, held so that the part `least` of the map's side is in the ROI and on the map."""
    half = scale / sqrt(2)
    eps = torch.finfo(dtype).eps
    # Half precision rounds a loc of less than 2 by as much; in float32 it is far less than a pixel.
    rounding = eps / 2 if eps > 1e-6 else 0.0
    # The middle of the map is always allowed.
    lowest = (least - half + rounding).clamp(max=0.5)
    highest = (1 - least + half - rounding).clamp(min=0.5)
    return loc.maximum(lowest).minimum(highest)
