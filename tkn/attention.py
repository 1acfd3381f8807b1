"""Attention windows f(x; loc, scale): the functions that weigh an activation map (Eqs. 2, 3, 10-13)."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from tkn.app.messages import unknown


def gaussian(z: Tensor) -> Tensor:
    """exp(-z^2 / 2) (Eq. 2), elementwise."""
    return torch.exp(-0.5 * z.square())


def cauchy(z: Tensor) -> Tensor:
    """1 / (1 + z^2) (Eq. 3), elementwise; heavier tails than the Gaussian."""
    return 1 / (1 + z.square())


#: How far `flat` takes to fall from 1 to 0: with the default scale_unit of 0.5 it ends at the ROI's edge (Eq. 15).
_FALL = sqrt(2) - 1


def flat(z: Tensor) -> Tensor:
    """1 up to |z| = 1, 0 from |z| = sqrt 2 on, between them the smooth step 1 - 3 t^2 + 2 t^3, elementwise.

    Not the paper's: at the start a window of scale_unit 0.5 is exactly 1 on the whole map, so that a trained network's
    convolutions compute what they did.
    """
    t = ((z.abs() - 1) / _FALL).clamp(0, 1)
    return 1 - t.square() * (3 - 2 * t)


#: The attention functions by their config names.
ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {"gaussian": gaussian, "cauchy": cauchy, "flat": flat}


def _slope_of_flat(z: Tensor, _value: Tensor) -> Tensor:
    t = ((z.abs() - 1) / _FALL).clamp(0, 1)
    return -6 / _FALL * t * (1 - t) * z.sign()


_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gaussian": lambda z, value: -z * value,
    "cauchy": lambda z, value: -2 * z * value.square(),
    "flat": _slope_of_flat,
}


def attention_slope(name: str, z: Tensor, value: Tensor) -> Tensor:
    """df/dz of the attention function called `name` at `z`, where it is `value`."""
    return _SLOPES[name](z, value)


def attention_function(name: str) -> Callable[[Tensor], Tensor]:
    """The attention function called `name`; ValueError with the nearest name if there is none."""
    if name not in ATTENTION:
        raise ValueError(unknown("attention", name, ATTENTION))
    return ATTENTION[name]


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 if it is of half precision, else `x` itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pixel_centres(length: int, like: Tensor) -> Tensor:
    """The centres (i + 0.5) / L of an axis of `length` pixels, as fractions of it: [L], in `like`'s type and place."""
    return (torch.arange(length, dtype=like.dtype, device=like.device) + 0.5) / length


def standardised(length: int, loc: Tensor, scale: Tensor, scale_unit: float) -> Tensor:
    """z = (x - loc) / (scale_unit * scale) at every pixel centre of one axis (Eqs. 6, 7): [C] and [C] -> [C, L].

    In float64 if loc and scale are, else in float32.
    """
    # In half precision neighbouring pixels of a large map would share a coordinate.
    loc, scale = at_least_float32(loc), at_least_float32(scale)
    return (pixel_centres(length, loc) - loc[:, None]) / (scale_unit * scale[:, None])


def separable_window(
    size: tuple[int, ...], loc: Tensor, scale: Tensor, function: Callable[[Tensor], Tensor], scale_unit: float
) -> Tensor:
    """The outer product of the axes' windows (Eq. 13).

    `size`: the map's spatial size; `loc`, `scale`: [dims, C], fractions of the map's side. Returns [C, *size], in
    float64 if loc and scale are, else in float32; NaN in a kernel's loc or scale makes its window NaN.
    """
    window = function(standardised(size[0], loc[0], scale[0], scale_unit))
    for axis in range(1, len(size)):
        window = window.unsqueeze(-1) * function(standardised(size[axis], loc[axis], scale[axis], scale_unit)).reshape(
            -1, *(1,) * axis, size[axis]
        )
    return window


def correlated_gaussian_window(
    size: tuple[int, int], loc: Tensor, scale: Tensor, rho: Tensor, scale_unit: float
) -> Tensor:
    """The bivariate Gaussian of Eqs. 4-7 with correlation `rho` [C]: [C, H, W], of the same type as `separable_window`.

    exp(-alpha / 2) with alpha = f(x)^2 - 2 rho f(x) f(y) + f(y)^2: Eq. 4 prints exp(-alpha), which at rho = 0 would
    not be the separable window of Eqs. 10-13.
    """
    z_rows = standardised(size[0], loc[0], scale[0], scale_unit).unsqueeze(-1)
    z_columns = standardised(size[1], loc[1], scale[1], scale_unit).unsqueeze(-2)
    alpha = z_rows.square() - 2 * rho[:, None, None] * z_rows * z_columns + z_columns.square()
    return torch.exp(-0.5 * alpha)
