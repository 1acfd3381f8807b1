"""Which inputs of a convolution are multiplied in pairs of bfloat16, and its weights in the same pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tkn.backends.cpu.rows import Bool, Float, Int32
from tkn.geometry import Geometry
from tkn.plan.graph import Convolve

#: Of the products in float32, the part that products of pairs may be at most: else nothing is gained.
_WORTH = 0.75
#: Fewer outputs of each input do not pay for its rounding.
_OUTPUTS = 8
#: Up to so many channels, those with the most pixels in common become pairs; of more, neighbours.
_MATCHED = 512


@dataclass(frozen=True, eq=False)
class Pairing:
    """The inputs as maps of pairs.

    `members`: [pairs, 2], the two channels of each, -1 for none. `beside`: the second is that of the next pixel, and
    the map of pairs is a column wider. `geometry`, `weight`: of the convolution of the pairs, as many taps of two
    bfloat16 in the place of a float32: [O, pairs of a group, kH, kW].
    """

    members: Int32
    beside: bool
    geometry: Geometry
    weight: Tensor

    def of(self, values: Int32, nothing: int) -> Int32:
        """[C, H, W] as pairs: [pairs, H, W or a column more, 2], `nothing` where there is none."""
        if self.beside:
            values = np.pad(values, ((0, 0), (0, 0), (1, 1)), constant_values=nothing)
            return np.stack([values[:, :, :-1], values[:, :, 1:]], axis=3)
        there = (self.members >= 0)[:, None, None, :]
        return np.where(there, values[self.members].transpose(0, 2, 3, 1), nothing)


def pairing_of(conv: Convolve, mask: Bool) -> Pairing | None:
    """How it is best computed in pairs; None where float32 is as fast. `mask`: [C, H, W], where the input may live."""
    channels, g = conv.weight.shape[1], conv.geometry
    if len(conv.weight) // conv.groups < _OUTPUTS:
        return None
    across = -(-channels // 2) * g.kernel[1]
    beside = channels * -(-g.kernel[1] // 2) if g.dilation[1] == 1 else across
    if min(across, beside) > _WORTH * channels * g.kernel[1]:
        return None
    if beside < across:
        return _of_pixels(conv)
    return _of_channels(conv, _matched(mask) if conv.groups == 1 else _neighbours(channels))


def paired_neighbours(weight: Tensor) -> Tensor:
    """[O, C, kH, kW] with pairs of neighbouring channels in the place of numbers: [O, (C + 1) // 2, kH, kW]."""
    return _joined(weight, _neighbours(weight.shape[1]))


def _of_channels(conv: Convolve, members: Int32) -> Pairing:
    channels = conv.weight.shape[1]
    groups = np.arange(conv.groups)[:, None, None] * channels
    everywhere = np.where(members >= 0, groups + members, -1).reshape(-1, 2)
    return Pairing(everywhere, False, conv.geometry, _joined(conv.weight, members))


def _of_pixels(conv: Convolve) -> Pairing:
    """A pixel with the one to its right: that at column x of the wider map is x - 1 and x."""
    g, weight = conv.geometry, conv.weight
    width, kernel = g.input_size[1] + 1, -(-g.kernel[1] // 2)
    before = g.before[1] - 1
    # As much padding behind as gives as many outputs.
    reach = (g.output_size[1] - 1) * g.stride[1] + 2 * (kernel - 1) + 1
    paired = replace(
        g,
        input_size=(g.input_size[0], width),
        kernel=(g.kernel[0], kernel),
        before=(g.before[0], before),
        after=(g.after[0], reach - width - before),
        dilation=(g.dilation[0], 2),
    )
    rounded = torch.nn.functional.pad(weight.bfloat16(), (0, 2 * kernel - g.kernel[1]))
    channels = np.arange(weight.shape[1] * conv.groups)
    return Pairing(np.stack([channels, channels], axis=1), True, paired, rounded.view(torch.float32))


def _joined(weight: Tensor, members: Int32) -> Tensor:
    rounded = weight.bfloat16()
    halves = [rounded[:, torch.from_numpy(np.maximum(column, 0))] for column in members.T]
    halves[1] = torch.where(torch.from_numpy(members[:, 1] >= 0)[:, None, None], halves[1], 0)
    return torch.stack(halves, dim=4).view(torch.float32)[..., 0]


def _neighbours(channels: int) -> Int32:
    members = np.arange(channels + channels % 2).reshape(-1, 2)
    return np.where(members < channels, members, -1)


def _matched(mask: Bool) -> Int32:
    """Pairs of channels that are alive at the same pixels: what lives alone takes the place of two."""
    channels = len(mask)
    if mask.all() or not 2 < channels <= _MATCHED:
        return _neighbours(channels)
    alive = mask.reshape(channels, -1).astype(np.float32)
    count = alive.sum(axis=1)
    apart: Float = count[:, None] + count - 2 * alive @ alive.T
    one, other = np.triu_indices(channels, 1)
    members, free = [], set(range(channels))
    nearest = np.argsort(apart[one, other], kind="stable")
    for a, b in zip(one[nearest].tolist(), other[nearest].tolist(), strict=True):
        if a in free and b in free:
            members.append((a, b))
            free -= {a, b}
            if len(free) < 2:
                break
    return np.array(sorted(members) + [(last, -1) for last in free])
