"""Which pixels a convolution's taps reach, in kernels: the one place where geometry is computed on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from tkn.geometry import Geometry

#: A convolution's numbers as the kernels take them: by axis stride, zeros before, dilation and kernel.
GeometryArguments = tuple[int, int, int, int, int, int, int, int]


def geometry_arguments(geometry: Geometry) -> GeometryArguments:
    """As every kernel here takes a convolution's geometry, rows before columns."""
    (sy, sx), (py, px), (dy, dx), (ky, kx) = geometry.stride, geometry.before, geometry.dilation, geometry.kernel
    return sy, sx, py, px, dy, dx, ky, kx


@triton.jit
def lowest(at, stride, before, dilation, kernel, FLIP: tl.constexpr):
    """The lowest coordinate that is reached from `at`: an input's from an output's, or with FLIP the other way."""
    if FLIP:
        return (tl.maximum(at + before - (kernel - 1) * dilation, 0) + stride - 1) // stride
    else:
        return tl.maximum(at * stride - before, 0)


@triton.jit
def highest(at, stride, before, dilation, kernel, length, FLIP: tl.constexpr):
    """The highest coordinate below `length` that is reached from `at`; below the lowest if there is none."""
    if FLIP:
        return tl.minimum((at + before) // stride, length - 1)
    else:
        return tl.minimum(at * stride - before + (kernel - 1) * dilation, length - 1)


@triton.jit
def tap(at, other, stride, before, dilation, kernel, FLIP: tl.constexpr):
    """The tap that joins two coordinates of an axis, from the output's `at` and the input's `other`, or with FLIP from
    the input's and the output's; -1 if none does."""
    distance = at + before - other * stride if FLIP else other + before - at * stride
    inside = tl.maximum(distance, 0)
    found = inside // dilation
    joins = (distance >= 0) & (found < kernel) & (found * dilation == inside)
    return tl.where(joins, found, -1)
