"""Poolings and upsampling, as modules, functions and methods: which of the engine's operations they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from tkn.geometry import Geometry, pair
from tkn.plan.graph import AdaptivePooling, Operation, Pooling, Resize, Size, UnevenMean


def resampling_operation(module: nn.Module, size: Size, result: Size) -> Operation | None:
    """What a module does to maps of `size`, of which it makes maps of the size `result`."""
    if type(module) is nn.MaxPool2d:
        return _maximum(module, size)
    if type(module) is nn.AvgPool2d:
        return _mean(module, size)
    if type(module) is nn.AdaptiveAvgPool2d:
        return _adaptive(size[1:], result[1:], average=True)
    if type(module) is nn.AdaptiveMaxPool2d and not module.return_indices:
        return _adaptive(size[1:], result[1:], average=False)
    return _resize(module, size, result) if isinstance(module, nn.Upsample) else None


def _adaptive(size: tuple[int, int], result: tuple[int, int], *, average: bool) -> Operation:
    if any(side % count for side, count in zip(size, result, strict=True)):
        return AdaptivePooling(result, average)
    # Of windows that do not overlap; of single pixels too, for the result has memory of its own.
    kernel = size[0] // result[0], size[1] // result[1]
    return Pooling(Geometry(size, kernel, kernel), average)


def _maximum(module: nn.MaxPool2d, size: Size) -> Pooling | None:
    if module.return_indices:
        return None
    padding = pair(module.padding)
    geometry = Geometry(
        size[1:], pair(module.kernel_size), pair(module.stride), padding, padding, pair(module.dilation)
    )
    geometry = geometry.covered() if module.ceil_mode else geometry
    # Where all of a window is padding, which dilation allows, torch gives minus infinity.
    return Pooling(geometry, average=False) if geometry.reaches_everywhere() else None


def _mean(module: nn.AvgPool2d, size: Size) -> Pooling | UnevenMean | None:
    padding = pair(module.padding)
    geometry = Geometry(size[1:], pair(module.kernel_size), pair(module.stride), padding, padding)
    covered = geometry.covered() if module.ceil_mode else geometry
    divisor = module.divisor_override
    if divisor is not None and divisor < 1:
        return None
    if covered == geometry and divisor is None and (module.count_include_pad or padding == (0, 0)):
        return Pooling(geometry, average=True)
    return UnevenMean(covered, module.count_include_pad, divisor)


def _resize(module: nn.Upsample, size: Size, result: Size) -> Operation | None:
    if module.mode == "area":
        return _adaptive(size[1:], result[1:], average=True)
    if module.mode not in ("nearest", "bilinear"):
        return None
    factors: tuple[float | None, float | None] = (None, None)
    if module.scale_factor is not None and not module.recompute_scale_factor:
        lines, columns = module.scale_factor if isinstance(module.scale_factor, tuple) else (module.scale_factor,) * 2
        factors = float(lines), float(columns)
    return Resize(result[1:], module.mode == "bilinear", bool(module.align_corners), factors)


#: Functions that pool: of how many axes, and the modules of the same first arguments.
_POOLINGS: dict[Any, tuple[int, type[nn.Module]]] = {
    F.adaptive_avg_pool1d: (1, nn.AdaptiveAvgPool1d),
    F.adaptive_avg_pool2d: (2, nn.AdaptiveAvgPool2d),
    F.adaptive_max_pool1d: (1, nn.AdaptiveMaxPool1d),
    F.adaptive_max_pool2d: (2, nn.AdaptiveMaxPool2d),
    F.avg_pool1d: (1, nn.AvgPool1d),
    F.avg_pool2d: (2, nn.AvgPool2d),
    F.max_pool1d: (1, nn.MaxPool1d),
    F.max_pool2d: (2, nn.MaxPool2d),
    torch.max_pool1d: (1, nn.MaxPool1d),
    torch.max_pool2d: (2, nn.MaxPool2d),
}


def resampling_module(n: fx.Node, dims: int) -> nn.Module | None:
    """The module that pools or resizes maps of `dims` axes as a call of a function or method does."""
    args: Any = n.args[1:]
    kwargs: Any = n.kwargs
    if not n.args or len(n.all_input_nodes) != 1 or dims not in (1, 2):
        return None
    if n.target in (torch.mean, "mean", torch.amax, "amax"):
        means = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
        kinds = means if n.target in (torch.mean, "mean") else (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
        return kinds[dims - 1](1) if _are_all_pixels(args, kwargs, dims) else None
    if n.target is F.interpolate:
        kwargs = {**dict(zip(("size", "scale_factor", "mode", "align_corners"), args, strict=False)), **kwargs}
        kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
        return None if len(args) > 4 or kwargs.pop("antialias", False) else nn.Upsample(**kwargs)
    of, kind = _POOLINGS.get(n.target, (0, nn.Identity))
    if of != dims or not all(value is None or _is_side(value, dims) for value in (*args, *kwargs.values())):
        return None  # such as (2,) for both sides
    if not issubclass(kind, nn.MaxPool1d | nn.MaxPool2d) or len(args) <= 4:
        return kind(*args, **kwargs)
    # Beyond these the functions' and the module's orders differ.
    if n.target in (torch.max_pool1d, torch.max_pool2d) and not kwargs:
        kernel_size, stride, padding, dilation, ceil_mode = args
        return kind(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)
    return None


def mean_axis(n: fx.Node) -> int | None:
    """The one axis over which a call gives means, which is then gone."""
    if n.target not in (torch.mean, "mean") or set(n.kwargs) - {"dim"} or len(n.args) + len(n.kwargs) != 2:
        return None
    axes = n.kwargs.get("dim", n.args[-1])
    if isinstance(axes, list | tuple) and len(axes) == 1:
        (axes,) = axes
    return axes if type(axes) is int else None


def _are_all_pixels(args: tuple[Any, ...], kwargs: dict[str, Any], dims: int) -> bool:
    """Whether the axes that a call reduces are those of pixels."""
    given = (*args, *(kwargs[key] for key in ("dim", "keepdim") if key in kwargs))
    axes = given[0] if given else None
    axes = (axes,) if isinstance(axes, int) and not isinstance(axes, bool) else axes
    pixels = set(range(2, 2 + dims))
    return (
        set(kwargs) <= {"dim", "keepdim"}
        and isinstance(axes, list | tuple)
        and {int(i) % (2 + dims) for i in axes} == pixels
    )


def _is_side(value: Any, dims: int) -> bool:
    """Whether it is a whole number or a flag, or `dims` of them."""
    if isinstance(value, list | tuple):
        return len(value) == dims and all(isinstance(one, int) for one in value)
    return isinstance(value, int)
