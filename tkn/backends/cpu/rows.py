"""Rows: how an activation of a batch lies in memory when only parts of it live; and the lists that kernels.cpp walks.

A tile is the images of a batch that are computed together, `lanes` of them. Its activation is a set of rows, one row of
`lanes` numbers for each (pixel, channel) inside a ROI. The rows of a pixel are contiguous and ascend with the channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tkn.geometry import Geometry, Pool
from tkn.kept import Kept

# What an array holds is said for the reader: numpy's own types get in the way.
Int32 = NDArray[Any]
Bool = NDArray[Any]
Float = NDArray[Any]

#: What the inputs of one output pixel may take of a second-level cache, bytes.
_CACHE = 256 * 1024


@dataclass(frozen=True, eq=False)
class Rows:
    """Which (channel, pixel) of an activation have a row, and where.

    `mask`: bool [C, *size], of any number of axes. `order`: the pixels, as indices into a map's, line by line, in the
    order of their rows; by default all.
    """

    mask: Bool
    order: Int32

    @classmethod
    def of(cls, mask: Bool, order: Int32 | None = None) -> Rows:
        pixels = prod(mask.shape[1:])
        return cls(mask, np.arange(pixels, dtype=np.int32) if order is None else order)

    @classmethod
    def full(cls, channels: int, size: tuple[int, ...]) -> Rows:
        return _full(channels, size)

    @property
    def channels(self) -> int:
        return self.mask.shape[0]

    @property
    def size(self) -> tuple[int, ...]:
        return self.mask.shape[1:]

    @property
    def pixels(self) -> int:
        return prod(self.size)

    @cached_property
    def by_pixel(self) -> Bool:
        """The mask as [pixels in order, C]."""
        return np.ascontiguousarray(self.mask.reshape(self.channels, -1).T[self.order])

    @cached_property
    def start(self) -> Int32:
        """First entry of each pixel in order, and their number: [pixels + 1]."""
        return cumulative(np.count_nonzero(self.by_pixel, axis=1))

    @cached_property
    def entry_position(self) -> Int32:
        """The position in `order` of each entry's pixel."""
        return self._entries[0].astype(np.int32)

    @cached_property
    def channel(self) -> Int32:
        """The channel of each entry."""
        return self._entries[1].astype(np.int32)

    @cached_property
    def _entries(self) -> tuple[Int32, Int32]:
        position, channel = np.nonzero(self.by_pixel)
        return position, channel

    @cached_property
    def _padded_start(self) -> Int32:
        count = np.diff(self.start)
        # Pixels a power of two apart would fall into the same sets of the caches.
        return cumulative(count + ((count > 0) & (count % 8 == 0)))

    @property
    def base(self) -> Int32:
        """First row of each pixel in order."""
        return self._padded_start[:-1]

    @property
    def count(self) -> int:
        """Rows of a tile, unused ones included."""
        return int(self._padded_start[-1])

    @cached_property
    def row(self) -> Int32:
        """The row of each entry."""
        first = self.base - self.start[:-1]
        return (np.arange(len(self.channel), dtype=np.int32) + first[self.entry_position]).astype(np.int32)

    @cached_property
    def dense(self) -> Int32:
        """The row of each (channel, pixel), -1 where there is none: [C, pixels]."""
        rows = np.full((self.channels, self.pixels), -1, dtype=np.int32)
        rows[self.channel, self.order[self.entry_position]] = self.row
        return rows

    @cached_property
    def live(self) -> int:
        """Number of entries."""
        return int(self.start[-1])

    def chunks(self, groups: int, taps: int, lanes: int, itemsize: int) -> tuple[Int32, Int32, int]:
        """The rows as the source of a convolution, by pixel index: (first entry of each chunk of channels [pixels,
        chunks + 1], base [pixels], chunks). Chunks do not cross groups, and the inputs of an output pixel from one
        chunk fit into a cache."""
        per_pixel = self.live / max(1, int(np.count_nonzero(np.diff(self.start))))
        wanted = int(np.ceil(per_pixel / groups * taps * lanes * itemsize / _CACHE))
        per_group = max(1, min(self.channels // groups, wanted))
        width = self.channels // groups
        bounds = np.concatenate(
            [group * width + (np.arange(per_group) * width) // per_group for group in range(groups)] + [[self.channels]]
        )
        before = np.zeros((len(self.order), self.channels + 1), dtype=np.int32)
        np.cumsum(self.by_pixel, axis=1, out=before[:, 1:])
        table = np.zeros((self.pixels, len(bounds)), dtype=np.int32)
        table[self.order] = self.start[:-1, None] + before[:, bounds]
        base = np.zeros(self.pixels, dtype=np.int32)
        base[self.order] = self.base
        return table, base, len(bounds) - 1


@lru_cache(maxsize=64)
def _full(channels: int, size: tuple[int, ...]) -> Rows:
    return Rows.of(np.ones((channels, *size), dtype=bool))


def cumulative(counts: Int32) -> Int32:
    """[0, c0, c0 + c1, ...]."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    if starts[-1] >= 2**31:
        raise ValueError(f"{starts[-1]} rows are too many for lists of 32 bits")
    return starts.astype(np.int32)


#: Tables by geometry, bytes: in three dimensions one can take a hundred megabytes.
_tables = Kept(128 * 2**20)


def window_table(geometry: Geometry) -> Int32:
    """The input pixel that each tap of each output pixel reads, -1 in the padding: [output pixels, taps]."""
    return _tables.get(geometry, partial(_window_table, geometry), lambda table: table.nbytes)


def _window_table(geometry: Geometry) -> Int32:
    table = np.zeros((1, 1), dtype=np.int64)
    for n, out, s, b, k, d in zip(
        geometry.input_size,
        geometry.output_size,
        geometry.stride,
        geometry.before,
        geometry.kernel,
        geometry.dilation,
        strict=True,
    ):
        place = np.arange(out)[:, None] * s - b + np.arange(k) * d  # along this axis, of [output, tap]
        # The axes before are [output pixels, taps] already.
        before, place = table[:, None, :, None], place[None, :, None, :]
        inside = (before >= 0) & (place >= 0) & (place < n)
        table = np.where(inside, before * n + place, -1).reshape(len(table) * out, -1)
    return table


Lists = tuple[Int32, Int32, Int32]


def forward_taps(geometry: Geometry, order: Int32) -> Lists:
    """(start, input pixel, tap) for every output pixel in `order`."""
    table = window_table(geometry)[order]
    inside = table >= 0
    taps = np.broadcast_to(np.arange(geometry.taps, dtype=np.int32), table.shape)
    return cumulative(inside.sum(axis=1)), table[inside].astype(np.int32), taps[inside]


def backward_taps(geometry: Geometry, order: Int32) -> Lists:
    """(start, output pixel, tap) for every input pixel in `order`: which outputs read it, and by which tap."""
    start, pixel, tap = _inverse(geometry)
    count = np.diff(start)[order]
    index = np.repeat(start[:-1][order] - cumulative(count)[:-1], count) + np.arange(count.sum())
    return cumulative(count), pixel[index], tap[index]


def _inverse(geometry: Geometry) -> Lists:
    made = partial(_make_inverse, geometry)
    return _tables.get(("inverse", geometry), made, lambda lists: sum(part.nbytes for part in lists))


def _make_inverse(geometry: Geometry) -> Lists:
    table = window_table(geometry)
    output, tap = np.nonzero(table >= 0)
    source = table[output, tap]
    by_source = np.argsort(source, kind="stable")
    count = np.bincount(source, minlength=prod(geometry.input_size))
    return cumulative(count), output[by_source].astype(np.int32), tap[by_source].astype(np.int32)


@lru_cache(maxsize=256)
def pool_windows(pool: Pool, size: tuple[int, ...]) -> Int32:
    """The pixels of each window: [windows, kernel pixels], windows and their pixels line by line."""
    nothing = (0,) * len(size)
    windows = Geometry(size, pool.kernel, pool.kernel, nothing, nothing, (1,) * len(size))
    return window_table(windows).astype(np.int32)


def pooled_order(pool: Pool | None, size: tuple[int, ...]) -> Int32 | None:
    """The pixels of a map in the order in which a pooled convolution computes them."""
    return None if pool is None else pool_windows(pool, size).reshape(-1)


@dataclass(frozen=True, eq=False)
class Children:
    """Which entries of `source` each entry of `output` combines, and how many of its window's pixels have no row."""

    source: Rows
    output: Rows
    start: Int32
    entry: Int32
    missing: Int32

    @classmethod
    def same(cls, source: Rows) -> Children:
        """Each entry from itself."""
        identity = np.arange(source.live + 1, dtype=np.int32)
        return cls(source, source, identity, identity[:-1], np.zeros(source.live, dtype=np.int32))

    @classmethod
    def pooled(cls, source: Rows, pool: Pool) -> Children:
        """Pooling of rows in the `pooled_order` of the same pool: a pixel has rows where any of its children has."""
        windows = pool_windows(pool, source.size)
        taps = windows.shape[1]
        entries = np.full(source.by_pixel.shape, -1, dtype=np.int32)
        entries[source.by_pixel] = np.arange(source.live, dtype=np.int32)
        by_window = entries.reshape(len(windows), taps, source.channels).transpose(0, 2, 1)
        live = by_window >= 0
        count = live.sum(axis=2)
        mask = (count > 0).T.reshape(source.channels, *pool.output_size(source.size))
        output = Rows.of(np.ascontiguousarray(mask))
        count = count[count > 0]
        return cls(source, output, cumulative(count), by_window[live], (taps - count).astype(np.int32))

    @classmethod
    def windows(cls, source: Rows, geometry: Geometry, constant: Bool) -> Children:
        """Any pooling of rows in the natural order; `constant` [C]: channels not zero where they have no row."""
        table = window_table(geometry)
        entries = np.full((source.pixels + 1, source.channels), -1, dtype=np.int32)
        entries[:-1][source.by_pixel] = np.arange(source.live, dtype=np.int32)
        by_window = entries[table].transpose(0, 2, 1)  # -1, the padding, is the last line
        live = by_window >= 0
        count = live.sum(axis=2)
        inside = (table >= 0).sum(axis=1)
        # Where a window reaches into the padding the mean of a constant is another.
        mask = (count > 0) | ((inside < geometry.taps)[:, None] & constant)
        output = Rows.of(np.ascontiguousarray(mask.T.reshape(source.channels, *geometry.output_size)))
        missing = (inside[:, None] - count)[mask]
        count = count[mask]
        return cls(source, output, cumulative(count), by_window[live], missing.astype(np.int32))

    def window_starts(self) -> Int32:
        """First source position of each output pixel's window."""
        return np.linspace(0, len(self.source.order), len(self.output.order) + 1).astype(np.int32)


def tile_lanes(batch: int, threads: int, width: int) -> int:
    """How many images make a tile: 4, 2 or 1 vectors of `width`, so that every thread has a tile if it can be."""
    for vectors in (4, 2):
        if batch > width * vectors // 2 and -(-batch // (width * vectors)) >= min(threads, -(-batch // width)):
            return width * vectors
    return width


def tiles_of(batch: int, lanes: int) -> int:
    return -(-batch // lanes)


def slices(total: int, parts: int) -> Iterator[tuple[int, int]]:
    """`total` things in `parts` consecutive ranges, as even as can be."""
    for part in range(parts):
        yield part * total // parts, (part + 1) * total // parts
