"""Maps of one image in memory, as the engine for small batches has them, and its instructions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from operator import attrgetter

import numpy as np

from tkn.backends.cpu.rows import Bool, Float, Int32
from tkn.backends.cpu.structs import Filled, Kind
from tkn.plan.lowering import Pending

#: Lines that begin at multiples of so many numbers would meet in the same places of a first-level cache.
_CLASHING = 256


class Order(Enum):
    """What lies side by side in memory, from the outermost to the innermost: lines, columns and channels."""

    PIXELS = "line, column, channel"
    LINES = "line, channel, column"
    PLANES = "channel, line, column"


@dataclass
class Map:
    """A map of one image in memory.

    `border`: zeros (above, left, below, right); `depth`: room for channels, of a pixel, in `Order.PIXELS`; `slack`:
    numbers at the map's end that loads may touch.
    """

    index: int
    channels: int
    size: tuple[int, ...]
    border: tuple[int, int, int, int]
    order: Order
    depth: int
    slack: int
    begin: int
    #: what it holds where nothing is written: [C]
    outside: Float
    #: everything is written in each run
    rewritten: bool

    @property
    def planar(self) -> bool:
        """Whether a channel's pixels lie side by side."""
        return self.order is not Order.PIXELS

    @property
    def _columns(self) -> int:
        return self.size[1] + self.border[1] + self.border[3]

    @property
    def pixel(self) -> int:
        """Numbers from one pixel to the next."""
        return 1 if self.planar else self.depth

    @property
    def line(self) -> int:
        """Numbers from one line to the next."""
        if self.order is Order.PLANES:
            return self._columns
        if self.order is Order.PIXELS:
            return self._columns * self.depth
        line = self._columns * self.channels
        return line + 16 if line % _CLASHING == 0 else line

    @property
    def channel(self) -> int:
        """Numbers from one channel to the next."""
        if self.order is Order.PIXELS:
            return 1
        return self._columns if self.order is Order.LINES else self._lines * self._columns

    @property
    def _lines(self) -> int:
        return self.size[0] + self.border[0] + self.border[2]

    @property
    def length(self) -> int:
        """Numbers that it takes."""
        return self._lines * self.line * (self.channels if self.order is Order.PLANES else 1) + self.slack

    @property
    def end(self) -> int:
        return self.begin + self.length

    @property
    def first(self) -> int:
        """Where pixel (0, 0) lies in memory."""
        return self.begin + self.border[0] * self.line + self.border[1] * self.pixel

    def at(self, pixel: Int32) -> Int32:
        """Where pixels, as indices into H * W, lie after the first."""
        rows, columns = np.divmod(pixel, self.size[1])
        return (rows * self.line + columns * self.pixel).astype(np.int32)


_line, _pixel = attrgetter("line"), attrgetter("pixel")


@dataclass(frozen=True, eq=False)
class MapValue(Pending):
    """An activation whose x is the channels of `parts` side by side, or of these only `channels`.

    `mask`: bool [C, H, W], outside of which x is the constant `outside`.
    """

    parts: tuple[Map, ...]
    mask: Bool
    channels: Int32 | None = None

    @property
    def size(self) -> tuple[int, ...]:
        return self.parts[0].size

    @property
    def whole(self) -> Map | None:
        """The map, if it holds just this activation."""
        return self.parts[0] if len(self.parts) == 1 and self.channels is None and not self.pending else None

    def all_channels(self) -> Int32:
        """Of the parts' those that it has."""
        return np.arange(len(self.mask)) if self.channels is None else self.channels

    def planes(self) -> tuple[Int32, Int32, Int32]:
        """Of each channel where it begins, and the numbers between its lines and between its pixels: [C]."""
        begins = [part.first + np.arange(part.channels) * part.channel for part in self.parts]
        lines, pixels = ([np.full(part.channels, n(part)) for part in self.parts] for n in (_line, _pixel))
        chosen = self.all_channels()
        first, line, pixel = (np.concatenate(one)[chosen].astype(np.int32) for one in (begins, lines, pixels))
        return first, line, pixel

    def live(self) -> Bool:
        """Where a map that holds it may not be zero: [C, H, W]."""
        constant: Bool = self.mask | (self.outside != 0)[:, None, None]
        return constant


@dataclass
class MapInstruction:
    """One instruction: its structure, where its maps begin, and into how many parts threads may divide it.

    `work`: how much there is before each part, and in all; None if each is as much.
    """

    kind: Kind
    spec: Filled
    source: int
    output: int
    parts: int
    dense: int = 0
    work: Int32 | None = None
