"""Rows: how the GPU's ROI backend keeps a map, one row of the batch for every number that may not be zero."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

#: Rows that are computed together: one side of a matrix product.
TILE = 64


class Outgrown(Exception):
    """What was to be made in the place of something else is larger than that."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of maps [C, H, W]: one for each live (pixel, channel), a pixel's channels side by side, neighbouring
    pixels near each other (in Morton order).

    A batch in rows is [capacity + 1, images]; its last row is zero, and `row` points there for what is not live.

    Attributes:
        capacity: rows there is place for, a multiple of `TILE`.
        live: int32 [1], how many are used.
        pixel: int32 [capacity], of each row, counted line by line.
        channel: int32 [capacity].
        row: int32 [C * H * W], of each number of a map.
        first: int32 [H * W], the first row of each pixel.
        number: int32 [H * W], how many rows each pixel has.
    """

    channels: int
    size: tuple[int, int]
    capacity: int
    live: Tensor
    pixel: Tensor
    channel: Tensor
    row: Tensor
    first: Tensor
    number: Tensor

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def tiles(self) -> int:
        return self.capacity // TILE

    @staticmethod
    def of(mask: Tensor, *, headroom: float = 1.0, capacity: int | None = None) -> Rows:
        """Of the numbers where `mask`, bool [C, H, W], is True, with place for `headroom` times as many, or for
        `capacity`; `Outgrown` if that is less. The host waits for the device."""
        channels, height, width = mask.shape
        order, inverse = morton_order((height, width), mask.device)
        by_pixel = mask.flatten(1).t()[order]
        position = by_pixel.flatten().cumsum(0, dtype=torch.int32)
        live = position[-1:]
        wanted = int(live)
        if capacity is None:
            capacity = max(TILE, round_up(min(int(headroom * wanted), mask.numel()), TILE))
        if wanted > capacity:
            raise Outgrown
        rows = torch.where(by_pixel, position.view_as(by_pixel) - 1, capacity)
        number = by_pixel.sum(1, dtype=torch.int32)
        first = number.cumsum(0, dtype=torch.int32) - number
        counted = torch.arange(1, capacity + 1, dtype=torch.int32, device=mask.device)
        # Of the first number that as many live ones end at: nothing is scattered, so the same every time.
        flat = torch.searchsorted(position, counted, out_int32=True).clamp(max=position.numel() - 1)
        return Rows(
            channels,
            (height, width),
            capacity,
            live.clone(),
            order[flat // channels].int(),
            flat % channels,
            rows[inverse].t().flatten().contiguous(),
            first[inverse],
            number[inverse],
        )

    def places(self) -> Tensor:
        """Where each row lies in a map [C * H * W]: int64 [capacity]; past it if unused."""
        used = torch.arange(self.capacity, device=self.pixel.device) < self.live
        return torch.where(used, self.channel.long() * self.pixels + self.pixel, self.channels * self.pixels)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is on the device."""
        return self.live, self.pixel, self.channel, self.row, self.first, self.number


def full_rows(channels: int, size: tuple[int, int], device: torch.device) -> Rows:
    """The rows of maps that may be anything; the same object again."""
    return _full_rows(channels, size, device)


@lru_cache(maxsize=64)
def _full_rows(channels: int, size: tuple[int, int], device: torch.device) -> Rows:
    return Rows.of(torch.ones(channels, *size, dtype=torch.bool, device=device))


@lru_cache(maxsize=64)
def morton_order(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The pixels in Morton order, int64 [H * W], and the place of each pixel in it."""
    y, x = torch.meshgrid(*(torch.arange(length) for length in size), indexing="ij")
    key = torch.zeros(size, dtype=torch.int64)
    for bit in range(16):
        key |= ((x >> bit) & 1) << (2 * bit) | ((y >> bit) & 1) << (2 * bit + 1)
    order = key.flatten().argsort()
    return order.to(device), order.argsort().to(device)


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is no smaller."""
    return -(-number // multiple) * multiple
