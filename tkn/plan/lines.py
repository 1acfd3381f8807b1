"""Networks of one dimension: their maps [B, C, L] are maps of one row to the engine, [B, C, 1, L]."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from tkn.plan.graph import Node


def is_convolution_of(module: nn.Module, source: Node) -> TypeGuard[nn.Conv1d | nn.Conv2d]:
    """Whether a module convolves the maps of `source`: torch takes others for one image without a batch."""
    return isinstance(module, nn.Conv1d if source.line else nn.Conv2d) and not source.flat


def as_of_rows(module: nn.Module) -> nn.Module | None:
    """A module that pools lines, as one of rows and columns; None if it does not."""
    m: Any = module
    if type(module) is nn.AdaptiveAvgPool1d:
        return nn.AdaptiveAvgPool2d(_of_row(m.output_size, 1))
    if type(module) is nn.AdaptiveMaxPool1d:
        return nn.AdaptiveMaxPool2d(_of_row(m.output_size, 1), m.return_indices)
    if type(module) not in (nn.MaxPool1d, nn.AvgPool1d):
        return None
    sides = (_of_row(m.kernel_size, 1), _of_row(m.stride, 1), _of_row(m.padding, 0))
    if isinstance(module, nn.MaxPool1d):
        return nn.MaxPool2d(*sides, _of_row(m.dilation, 1), m.return_indices, m.ceil_mode)
    return nn.AvgPool2d(*sides, m.ceil_mode, m.count_include_pad)


def _of_row(value: Any, across: int) -> tuple[int, Any]:
    """An argument for one axis as one for two: `across` the row, and along it."""
    return across, value[0] if isinstance(value, tuple | list) else value


def whole_rows(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A target layer's loc and scale [2, C]; of one dimension, [1, C], with all of the row: a window of 1 (Eq. 13)."""
    if len(loc) == 2:
        return loc, scale
    return torch.cat([torch.full_like(loc, 0.5), loc]), torch.cat([torch.ones_like(scale), scale])
