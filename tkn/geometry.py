"""How a convolution's taps and a pooling's windows reach from an input's pixels to an output's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import nn


def pair(value: Any) -> tuple[int, int]:
    """A layer's argument for both axes: a number or two."""
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


@dataclass(frozen=True)
class Geometry:
    """How a convolution's taps reach from its input's pixels to its output's, along each axis of its maps."""

    input_size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    #: zeros before the first pixel of each axis (row and column), after the last
    before: tuple[int, ...] = (0, 0)
    after: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)

    @classmethod
    def of_conv(cls, layer: nn.Conv1d | nn.Conv2d, input_size: tuple[int, ...]) -> Geometry:
        """Of a convolution on maps of `input_size`, which are padded already unless it pads with zeros; one of one
        dimension on maps of one row."""
        around = layer._reversed_padding_repeated_twice  # of the last axis first
        if layer.padding_mode != "zeros":
            around = [0] * len(around)
        across = 2 - len(layer.kernel_size)  # of one row
        before, after = (*[0] * across, *around[-2::-2]), (*[0] * across, *around[::-2])
        kernel, stride, dilation = (
            (*[1] * across, *sides) for sides in (layer.kernel_size, layer.stride, layer.dilation)
        )
        return cls(input_size, kernel, stride, before, after, dilation)

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
        return replace(self, after=tuple(after))

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
    def output_size(self) -> tuple[int, ...]:
        return tuple(
            (n + b + a - d * (k - 1) - 1) // s + 1
            for n, b, a, d, k, s in zip(
                self.input_size, self.before, self.after, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    @property
    def taps(self) -> int:
        return prod(self.kernel)


@dataclass(frozen=True)
class Pool:
    """A pooling of windows that do not overlap: kernel == stride, no padding."""

    kernel: tuple[int, ...]
    average: bool = False

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n // k for n, k in zip(size, self.kernel, strict=True))


def simple_pool(layer: Any, dims: int) -> Pool | None:
    """A max or average pooling of maps of `dims` axes as a Pool; None if its windows overlap or leave the map."""

    def sides(value: Any) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value)

    average = not hasattr(layer, "return_indices")
    kernel = sides(layer.kernel_size)
    unusual = layer.ceil_mode or any(sides(layer.padding)) or sides(layer.stride) != kernel
    if average:
        unusual = unusual or getattr(layer, "divisor_override", None) is not None
    else:
        unusual = unusual or layer.return_indices or sides(layer.dilation) != (1,) * dims
    return None if unusual else Pool(kernel, average)
