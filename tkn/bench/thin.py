"""The honest rival: a dense network with narrower convolutions, of as many multiply-adds as a targeted one."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from tkn.macs import count_macs
from tkn.models.common import initialise
from tkn.models.stn import SpatialTransformer


def thin(model: nn.Module, input_size: tuple[int, int, int], macs: int, multiple: int = 1) -> nn.Module:
    """A freshly initialised `model` with every convolution's width scaled, as near to `macs` as whole widths allow.

    `model`: a dense network; its fully connected layers keep their widths. `multiple`: widths are multiples of this.
    """
    low, high = 0.0, 1.0
    # The count grows with the factor in steps; after these halvings one step is left between the two.
    for _ in range(20):
        middle = (low + high) / 2
        if _macs_scaled(model, input_size, middle, multiple) < macs:
            low = middle
        else:
            high = middle
    nearest = min((low, high), key=lambda factor: abs(_macs_scaled(model, input_size, factor, multiple) - macs))
    thinned = _scaled(model, input_size, nearest, multiple)
    initialise(thinned)
    for module in thinned.modules():
        if isinstance(module, SpatialTransformer):
            module.reset_transform()
    return thinned


def _macs_scaled(model: nn.Module, input_size: tuple[int, int, int], factor: float, multiple: int) -> int:
    return count_macs(_scaled(model, input_size, factor, multiple), input_size).total_dense


def _scaled(model: nn.Module, input_size: tuple[int, int, int], factor: float, multiple: int) -> nn.Module:
    """`model` with the convolutions' widths times `factor`; what follows them takes the channels that arrive."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        scaled = copy.deepcopy(model)
        convolutions = 0
        for parent in list(scaled.modules()):
            for name, child in list(parent.named_children()):
                lazy: LazyModuleMixin | None = None
                if isinstance(child, nn.Conv2d):
                    lazy = _lazy_convolution(child, _width(child.out_channels, factor, multiple, convolutions))
                    convolutions += 1
                elif isinstance(child, nn.BatchNorm2d):
                    lazy = nn.LazyBatchNorm2d(child.eps, child.momentum)
                elif isinstance(child, nn.Linear):
                    lazy = nn.LazyLinear(child.out_features, child.bias is not None)
                elif isinstance(child, _BatchNorm):
                    lazy = nn.LazyBatchNorm1d(child.eps, child.momentum)
                if lazy is not None:
                    setattr(parent, name, lazy)
        scaled.eval()
        with torch.no_grad():
            scaled(torch.zeros(1, *input_size))
    return scaled


def _width(width: int, factor: float, multiple: int, position: int) -> int:
    """`width` times `factor` in whole multiples, rounded up or down by the convolution's position in the network.

    Equal convolutions so take their steps one after the other, and the count comes nearer to the wanted one.
    """
    phase = position * 0.6180339887 % 1
    return min(width, max(1, int(factor * width / multiple + phase)) * multiple)


def _lazy_convolution(conv: nn.Conv2d, width: int) -> nn.LazyConv2d:
    assert conv.groups == 1
    return nn.LazyConv2d(
        width,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
