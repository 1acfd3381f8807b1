"""How a convolution's taps and a pooling's windows reach from an input's pixels to an output's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn


def pair(value: Any) -> tuple[int, int]:
    """A layer's argument for both axes: a number or two."""
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


@dataclass(frozen=True)
class Geometry:
    """How a convolution's taps reach from its input's pixels to its output's."""

    input_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    #: zeros before the first row and column, after the last
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of_conv(cls, layer: nn.Conv2d, input_size: tuple[int, int]) -> Geometry:
        """Of a convolution on maps of `input_size`, which are padded already unless it pads with zeros."""
        top = bottom = left = right = 0
        if layer.padding_mode == "zeros":
            left, right, top, bottom = layer._reversed_padding_repeated_twice
        kernel, stride, dilation = pair(layer.kernel_size), pair(layer.stride), pair(layer.dilation)
        return cls(input_size, kernel, stride, (top, left), (bottom, right), dilation)

    def covered(self) -> Geometry:
        """With padding after the last row and column, if windows would leave some out (torch's `ceil_mode`)."""
        after = []
        for axis, (n, b, a, k, s, d) in enumerate(
            zip(self.input_size, self.before, self.after, self.kernel, self.stride, self.dilation, strict=True)
        ):
            count = self.output_size[axis] + 1
            begins, ends = (count - 1) * s, (count - 1) * s + d * (k - 1) + 1
            # One window more, unless it would lie in the padding alone, or none is missing.
            left_out = n + b + a > ends - s
            after.append(ends - n - b if left_out and begins < n + b else a)
        return replace(self, after=(after[0], after[1]))

    def reaches_everywhere(self) -> bool:
        """Whether every window has a pixel of the map."""
        for n, b, k, s, d, outputs in zip(
            self.input_size, self.before, self.kernel, self.stride, self.dilation, self.output_size, strict=True
        ):
            for output in range(outputs):
                first = output * s - b
                if not any(0 <= pixel < n for pixel in range(first, first + d * k, d)):
                    return False
        return True

    @property
    def output_size(self) -> tuple[int, int]:
        height, width = (
            (n + b + a - d * (k - 1) - 1) // s + 1
            for n, b, a, d, k, s in zip(
                self.input_size, self.before, self.after, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return height, width

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class Pool:
    """A pooling of windows that do not overlap: kernel == stride, no padding."""

    kernel: tuple[int, int]
    average: bool = False

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.kernel[0], size[1] // self.kernel[1]


def simple_pool(layer: nn.Module) -> Pool | None:
    """A MaxPool2d or AvgPool2d as a Pool; None if its windows overlap or leave the map."""
    assert isinstance(layer, nn.MaxPool2d | nn.AvgPool2d)
    average = isinstance(layer, nn.AvgPool2d)
    kernel, stride, padding = pair(layer.kernel_size), pair(layer.stride), pair(layer.padding)
    unusual = layer.divisor_override is not None if average else layer.return_indices or pair(layer.dilation) != (1, 1)
    if stride != kernel or padding != (0, 0) or layer.ceil_mode or unusual:
        return None
    return Pool(kernel, average)
