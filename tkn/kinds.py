"""Which target layer it is: by how many windows an output channel has, and whether its ROIs follow the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tkn.adaptive import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d
from tkn.layers import TargetConv1d, TargetConv2d, TargetConv3d, TargetConvNd
from tkn.several import (
    Combine,
    MixtureConv1d,
    MixtureConv2d,
    MixtureConv3d,
    PartsConv1d,
    PartsConv2d,
    PartsConv3d,
    check_combine,
    check_windows,
)

_PLAIN: tuple[type[TargetConvNd], ...] = (TargetConv1d, TargetConv2d, TargetConv3d)
_ADAPTIVE: tuple[type[TargetConvNd], ...] = (AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d)
_MIXTURES: tuple[Callable[..., TargetConvNd], ...] = (MixtureConv1d, MixtureConv2d, MixtureConv3d)
_PARTS: tuple[Callable[..., TargetConvNd], ...] = (PartsConv1d, PartsConv2d, PartsConv3d)

#: What a group `attention` says of layers of one rectangle a kernel, which earlier versions knew alone.
PLAIN: dict[str, Any] = {"windows": 1, "combine": "max", "adaptive": False}


def other_than_plain(attention: Mapping[str, Any]) -> dict[str, Any]:
    """What a group `attention`, also one of an earlier version, says of other layers than these."""
    return {key: attention[key] for key, plain in PLAIN.items() if attention.get(key, plain) != plain}


def target_layer(
    dims: int, *, windows: int = 1, combine: Combine = "max", adaptive: bool = False
) -> Callable[..., TargetConvNd]:
    """What makes a target layer of `dims` dimensions of the arguments of `TargetConv2d`.

    windows: of each output channel; combine: what more than one come to: the "max" or "sum" of them times one
    convolution, or "parts", the sum of as many kernels with a window each. adaptive: ROIs that follow the image, of one
    window. ValueError for what can't be.
    """
    check_windows(windows)
    check_combine(combine)
    if not isinstance(adaptive, bool):
        raise ValueError(f"adaptive={adaptive!r} must be true or false")
    if adaptive and windows > 1:
        raise ValueError(f"adaptive=True moves one window of each channel: windows={windows} must be 1")
    if adaptive:
        return _ADAPTIVE[dims - 1]
    if windows == 1:
        return _PLAIN[dims - 1]
    if combine == "parts":
        return partial(_PARTS[dims - 1], windows=windows)
    return partial(_MIXTURES[dims - 1], windows=windows, combine=combine)
