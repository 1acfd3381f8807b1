"""Attention windows f(x; loc, scale): the functions that weigh an activation map (Eqs. 2, 3, 10-13)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tkn.app.messages import unknown


def gaussian(z: Tensor) -> Tensor:
    """exp(-z^2 / 2) (Eq. 2), elementwise."""
    return torch.exp(-0.5 * z.square())


def cauchy(z: Tensor) -> Tensor:
    """1 / (1 + z^2) (Eq. 3), elementwise; heavier tails than the Gaussian."""
    return 1 / (1 + z.square())


#: The attention functions by their config names.
ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {"gaussian": gaussian, "cauchy": cauchy}


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
