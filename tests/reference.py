"""A slow, obvious float64 reference of target layers: loops over pixels, no torch convolution."""

from __future__ import annotations

from itertools import product
from math import sqrt

import torch
from torch import Tensor


def flat(z: Tensor) -> Tensor:
    """1 up to 1, 0 from sqrt 2 on, and the smooth step between."""
    t = (sqrt(2) - z.abs()) / (sqrt(2) - 1)
    return torch.where(t >= 1, 1.0, torch.where(t <= 0, 0.0, 3 * t**2 - 2 * t**3))


_FUNCTIONS = {
    "gaussian": lambda z: torch.exp(-(z**2) / 2),
    "cauchy": lambda z: 1 / (1 + z**2),
    "flat": flat,
}


def window(size: tuple[int, ...], loc: Tensor, scale: Tensor, attention: str, scale_unit: float) -> Tensor:
    """Eqs. 2, 3, 13, and the flat window, pixel by pixel: loc, scale [dims, C] -> [C, *size]."""
    values = []
    for pixel in product(*map(range, size)):
        value = torch.ones_like(loc[0])
        for axis, i in enumerate(pixel):
            z = ((i + 0.5) / size[axis] - loc[axis]) / (scale_unit * scale[axis])
            value = value * _FUNCTIONS[attention](z)
        values.append(value)
    return torch.stack(values, dim=-1).reshape(-1, *size)


def roi_mask(size: tuple[int, ...], loc: Tensor, scale: Tensor) -> Tensor:
    """Eq. 15: 1 at every pixel whose centre lies inside the ROI, else 0: loc, scale [dims, C] -> [C, *size]."""
    locs, scales = loc.detach().double().T.tolist(), scale.detach().double().T.tolist()
    mask = torch.zeros(len(locs), *size, dtype=torch.float64)
    for channel, pixel in product(range(len(locs)), product(*map(range, size))):
        mask[(channel, *pixel)] = all(
            (m - s / sqrt(2)) * length <= i + 0.5 <= (m + s / sqrt(2)) * length
            for i, length, m, s in zip(pixel, size, locs[channel], scales[channel], strict=True)
        )
    return mask


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The convolution, output pixel by output pixel; `padding`: zeros (before, after) each axis."""
    kernel = weight.shape[2:]
    padded = torch.zeros(
        *x.shape[:2],
        *(n + before + after for n, (before, after) in zip(x.shape[2:], padding, strict=True)),
        dtype=x.dtype,
    )
    padded[(..., *(slice(before, before + n) for n, (before, _) in zip(x.shape[2:], padding, strict=True)))] = x
    size = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    taps = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    pixels = []
    for pixel in product(*map(range, size)):
        corner = [i * s for i, s in zip(pixel, stride, strict=True)]
        seen = [slice(c, c + d * (k - 1) + 1, d) for c, k, d in zip(corner, kernel, dilation, strict=True)]
        patch = padded[(..., *seen)].reshape(len(x), groups, 1, weight.shape[1], -1)
        pixels.append((patch * taps).sum(dim=(3, 4)).reshape(len(x), -1))
    output = torch.stack(pixels, dim=-1)
    return (output if bias is None else output + bias[:, None]).reshape(len(x), -1, *size)


def same_padding(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """What padding="same" means: the odd zero of an even kernel goes after."""
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((t // 2, t - t // 2) for t in total)
