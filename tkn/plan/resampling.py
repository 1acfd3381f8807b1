"""Maps of other sizes, whose pixels are weighted sums of windows: how much of which line and of which column."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.backends.cpu.rows import Float, Int32
from tkn.plan.graph import AdaptivePooling, Resize, UnevenMean

Resampling = Resize | AdaptivePooling | UnevenMean


@dataclass(frozen=True, eq=False)
class Axis:
    """Of each output along an axis the first input that it reads, and the weights from there on, zero where it reads
    none: [outputs], [outputs, taps]."""

    first: Int32
    weight: Float

    @classmethod
    def of_windows(cls, begins: Int32, ends: Int32, each: Float, inputs: int) -> Axis:
        """Windows [begins, ends) among so many inputs, and the weight of `each` input of one: [outputs]."""
        taps = int((ends - begins).max())
        first = np.minimum(begins, inputs - taps)  # all taps lie inside
        place = first[:, None] + np.arange(taps)
        inside = (place >= begins[:, None]) & (place < ends[:, None])
        return cls(first.astype(np.int32), np.where(inside, each[:, None], 0.0))


def resample(operation: Resampling, x: Tensor) -> Tensor:
    """By torch: [B, C, H, W]."""
    if isinstance(operation, Resize):
        return _resized(operation, x)
    if isinstance(operation, AdaptivePooling):
        pool = F.adaptive_avg_pool2d if operation.average else F.adaptive_max_pool2d
        result: Tensor = pool(x, operation.output_size)
        return result
    g = operation.geometry
    ceil = g.after != g.before
    return F.avg_pool2d(x, g.kernel, g.stride, g.before, ceil, operation.counts_padding, operation.divisor)


def _resized(resize: Resize, x: Tensor) -> Tensor:
    size, (lines, columns) = resize.output_size, resize.factors
    if resize.bilinear:
        made: Tensor = torch.ops.aten.upsample_bilinear2d(x, size, resize.align_corners, lines, columns)
    else:
        made = torch.ops.aten.upsample_nearest2d(x, size, lines, columns)
    return made


def axes(operation: Resampling, size: tuple[int, int]) -> tuple[Axis, Axis]:
    """Of the lines and of the columns of maps of `size`. Of a maximum the weights only say what is read."""
    if isinstance(operation, Resize):
        return _resized_axis(operation, size, 0), _resized_axis(operation, size, 1)
    if isinstance(operation, AdaptivePooling):
        height, width = operation.output_size
        return _adaptive_axis(size[0], height), _adaptive_axis(size[1], width)
    return _mean_axis(operation, 0, operation.divisor), _mean_axis(operation, 1, operation.divisor and 1)


def _resized_axis(resize: Resize, size: tuple[int, int], axis: int) -> Axis:
    """Where between the inputs torch takes the outputs from, seen by their numbers; the nearest as in float32."""
    inputs, outputs = size[axis], resize.output_size[axis]
    dtype = torch.float64 if resize.bilinear else torch.float32
    numbers = torch.arange(inputs, dtype=dtype, device="cpu").reshape(1, 1, -1, 1)
    along = Resize((outputs, 1), resize.bilinear, resize.align_corners, (resize.factors[axis], None))
    position = _resized(along, numbers).flatten().numpy()
    first = np.minimum(np.floor(position), max(0, inputs - 2)).astype(np.int32)
    if not resize.bilinear or inputs == 1:
        return Axis(position.astype(np.int32), np.ones((outputs, 1)))
    return Axis(first, np.stack([1 - (position - first), position - first], axis=1))


def _adaptive_axis(inputs: int, outputs: int) -> Axis:
    output = np.arange(outputs)
    begins, ends = output * inputs // outputs, -(-(output + 1) * inputs // outputs)
    return Axis.of_windows(begins, ends, 1 / (ends - begins), inputs)


def _mean_axis(mean: UnevenMean, axis: int, divisor: int | None) -> Axis:
    g = mean.geometry
    inputs, before = g.input_size[axis], g.before[axis]
    begins = np.arange(g.output_size[axis]) * g.stride[axis] - before
    ends = np.minimum(begins + g.kernel[axis], inputs + before)  # what ceil_mode adds is never counted
    first, last = np.maximum(begins, 0), np.minimum(ends, inputs)
    count = ends - begins if mean.counts_padding else last - first
    each = 1 / count if divisor is None else np.full(len(count), 1 / divisor)
    return Axis.of_windows(first, last, each, inputs)


def windows(lines: Axis, columns: Axis, width: int) -> tuple[Int32, Float]:
    """What each output pixel reads of a map `width` columns wide, -1 where a tap reads nothing, and the weights:
    [pixels, taps]."""
    weight = (lines.weight[:, None, :, None] * columns.weight[None, :, None, :]).reshape(
        len(lines.first) * len(columns.first), -1
    )
    y, x = (axis.first[:, None] + np.arange(axis.weight.shape[1]) for axis in (lines, columns))
    pixel = (y[:, None, :, None] * width + x[None, :, None, :]).reshape(weight.shape)
    return np.where(weight != 0, pixel, -1), weight
