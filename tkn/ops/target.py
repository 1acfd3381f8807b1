"""A target layer and the ReLU and pooling that follow it, by the engine of its choice."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tkn.backends.cpu.build import available
from tkn.backends.cpu.stage import Activation, Stage
from tkn.backends.torch.fourier import uses_fourier
from tkn.geometry import Geometry, Pool, pair
from tkn.ops.choose import LEAST_WORK, MOST_SHARE, Engine, choices, part_of, supported
from tkn.roi import roi_areas, roi_mask
from tkn.tracing import followed

#: States of a layer's ROIs whose lists are kept: training and evaluation, whole and last batches.
_KEPT = 4


class TargetLayer(Protocol):
    """What the engine needs of a TargetConv2d."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def loc(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def kernel_size(self) -> tuple[int, ...]: ...
    @property
    def stride(self) -> tuple[int, ...]: ...
    @property
    def dilation(self) -> tuple[int, ...]: ...
    @property
    def padding_mode(self) -> str: ...

    in_channels: int
    out_channels: int
    groups: int
    clip: bool
    engine: Engine
    _reversed_padding_repeated_twice: list[int]

    def rois(self, size: tuple[int, ...]) -> Tensor: ...
    def window(self, size: tuple[int, ...]) -> Tensor: ...
    def dense(self, input: Tensor) -> Tensor: ...


def run_target(
    layer: TargetLayer, x: Tensor | Activation, *, relu: bool = False, pool: Pool | None = None
) -> Tensor | Activation:
    """The layer, then ReLU, then pooling: [B, C, H, W] or rows -> [B, O, H', W'], as rows if the ROI engine ran.

    ValueError if the layer's engine is "roi" and can't compute x.
    """
    if _with_roi(layer, x, relu, pool):
        return _roi(layer, x, relu, pool)
    return _dense(layer, x, relu, pool)


def as_map(layer: TargetLayer, x: Tensor | Activation) -> Tensor:
    """The output of `layer`, or the input of one after it: [B, C, H, W] in its memory format, under autocast in that
    type, as torch's convolutions return it."""
    if isinstance(x, Tensor):
        return x
    dtype = _autocast() if x.data.dtype == torch.float32 else None
    return x.unpack(channels_last=_channels_last(layer), dtype=dtype)


def _channels_last(layer: TargetLayer) -> bool:
    """Whether the layer's weight, and so its output, is in channels-last memory format."""
    return layer.weight.is_contiguous(memory_format=torch.channels_last) and not layer.weight.is_contiguous()


def _with_roi(layer: TargetLayer, x: Tensor | Activation, relu: bool, pool: Pool | None) -> bool:
    data = x.data if isinstance(x, Activation) else x
    if layer.engine == "dense" or followed(data):
        return False
    channels = x.rows.channels if isinstance(x, Activation) else x.shape[1] if x.dim() == 4 else None
    if channels != layer.in_channels or 0 in data.shape:
        return False  # torch's own errors, and its unbatched inputs
    parameters = [t for t in (layer.weight, layer.bias, layer.loc, layer.scale) if t is not None]
    reason = supported(data if data.dtype == _computed_in(data) else data.new_empty(0).float(), *parameters)
    if layer.engine == "roi":
        if reason is not None:
            raise ValueError(f"engine='roi': {reason}; engine='auto' takes torch there")
        return available(layer.weight.dtype)
    if reason is not None or not layer.clip or layer.padding_mode != "zeros":
        return False
    return _roi_is_faster(layer, x, relu, pool)


def _computed_in(data: Tensor) -> torch.dtype:
    """The type in which the engine computes this input: float32 for halves under autocast, which leaves float64."""
    if _autocast() is not None and data.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return data.dtype


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def _size(x: Tensor | Activation) -> tuple[int, int, int]:
    """(B, H, W)"""
    if isinstance(x, Activation):
        return x.tiles.batch, *x.rows.size
    return x.shape[0], x.shape[2], x.shape[3]


def conv_geometry(layer: TargetLayer | nn.Conv2d, size: tuple[int, int]) -> Geometry:
    """Of a convolution on maps of `size`, padded before unless it pads with zeros."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if layer.padding_mode != "zeros":  # padded before
        top = bottom = left = right = 0
    return Geometry(
        size, pair(layer.kernel_size), pair(layer.stride), (top, left), (bottom, right), pair(layer.dilation)
    )


def _roi_is_faster(layer: TargetLayer, x: Tensor | Activation, relu: bool, pool: Pool | None) -> bool:
    batch, height, width = _size(x)
    geometry = conv_geometry(layer, (height, width))
    size = geometry.output_size
    if min(size) < 1:
        return False  # torch's own error
    per_pixel = layer.out_channels * layer.in_channels // layer.groups * geometry.taps
    if float(per_pixel) * size[0] * size[1] * batch < LEAST_WORK:
        return False
    share = _share(layer, size)
    # With pooling the engine may win even so: it never writes the whole map.
    if share > MOST_SHARE and pool is None:
        return False
    data = x.data if isinstance(x, Activation) else x
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (data, layer.weight, layer.loc))
    grad_x = grad and data.requires_grad
    last = _channels_last(layer)
    key = (
        layer.in_channels,
        layer.out_channels,
        layer.groups,
        geometry,
        batch,
        data.dtype,
        ("relu", relu),
        pool,
        ("grad", grad, grad_x),
        ("channels_last", last),
        ("autocast", _autocast()),
        ("fourier", uses_fourier(layer)),
        # The engine leaves out inputs that have no row.
        ("rows", part_of(x.rows.live / (x.rows.channels * x.rows.pixels)) if isinstance(x, Activation) else None),
    )
    # Rows have a format of their own.
    memory_format = torch.channels_last if last and isinstance(x, Tensor) else torch.contiguous_format

    def trial(compute: Any) -> Any:
        def run() -> None:
            zeros = torch.zeros_like(data, memory_format=memory_format, requires_grad=grad_x)
            input = Activation(zeros, x.rows, x.tiles) if isinstance(x, Activation) else zeros
            result = as_map(layer, compute(layer, input, relu, pool))
            if grad:
                wanted = [t for t in (zeros, layer.weight, layer.bias, layer.loc, layer.scale) if t is not None]
                torch.autograd.grad(result.sum(), [t for t in wanted if t.requires_grad])

        return run

    return choices.faster(key, share, _computed_in(data), trial(_roi), trial(_dense))


_shares: WeakKeyDictionary[Any, tuple[Any, float]] = WeakKeyDictionary()


def _share(layer: TargetLayer, size: tuple[int, int]) -> float:
    """The share of the map's pixels inside the ROIs, kept while loc and scale stay: it takes as long as a small layer.

    A change that torch does not count, through .data, is not seen; it can only make the choice a slower one.
    """
    # Tensors made in inference mode have no version, and can't be trained.
    state = (size, *(None if t.is_inference() else t._version for t in (layer.loc, layer.scale)))
    known = _shares.get(layer)
    if known is None or known[0] != state:
        share = float(roi_areas(layer.rois(size)).sum()) / (layer.out_channels * size[0] * size[1])
        known = _shares[layer] = (state, share)
    return known[1]


def _dense(layer: TargetLayer, x: Tensor | Activation, relu: bool, pool: Pool | None) -> Tensor:
    y = layer.dense(as_map(layer, x))
    if relu:
        y = F.relu(y)
    if pool is not None:
        y = F.avg_pool2d(y, pool.kernel) if pool.average else F.max_pool2d(y, pool.kernel)
    return y


def _roi(
    layer: TargetLayer, x: Tensor | Activation, relu: bool, pool: Pool | None, bfloat16: bool = False
) -> Activation:
    """`bfloat16`: in products of it, where the machine has them."""
    if _autocast() is not None:
        bfloat16 = _autocast() == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            return _roi(layer, x, relu, pool, bfloat16)
    if layer.padding_mode != "zeros":
        dense = x.unpack() if isinstance(x, Activation) else x
        x = F.pad(dense, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    if isinstance(x, Tensor):
        x = Activation.pack(x, layer.weight.dtype)
    geometry = conv_geometry(layer, x.rows.size)
    size = geometry.output_size
    if min(size) < 1:
        raise ValueError(f"kernel_size={layer.kernel_size} does not fit into a padded input of {_size(x)[1:]} pixels")
    if pool is not None and min(pool.output_size(size)) < 1:
        raise ValueError(f"a pooling of {pool.kernel} pixels is larger than the map, {size}")
    stage = _stage(layer, x, geometry, relu, pool, bfloat16)
    return stage(x, layer.weight, layer.bias, layer.window(size))


_stages: WeakKeyDictionary[Any, OrderedDict[Any, Stage]] = WeakKeyDictionary()


def _stage(
    layer: TargetLayer, x: Activation, geometry: Geometry, relu: bool, pool: Pool | None, bfloat16: bool
) -> Stage:
    """The lists for the layer's ROIs as they are now, made anew only if these have moved to other pixels."""
    size = geometry.output_size
    rois = layer.rois(size) if layer.clip else None
    key = (
        None if rois is None else rois.numpy().tobytes(),
        id(x.rows),  # kept alive by the stage
        x.tiles,
        x.data.dtype,
        geometry,
        relu,
        pool,
        bfloat16,
    )
    kept = _stages.setdefault(layer, OrderedDict())
    if key not in kept:
        everywhere = np.ones((layer.out_channels, *size), dtype=bool)
        mask = everywhere if rois is None else roi_mask(size, rois).numpy()
        kept[key] = Stage(x.rows, mask, geometry, layer.groups, relu, pool, x.tiles, x.data.dtype, bfloat16)
        if len(kept) > _KEPT:
            kept.popitem(last=False)
    return kept[key]
