"""Maps of one image in memory, as the engine for small batches has them, and its instructions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tkn.backends.cpu.rows import Bool, Float, Int32
from tkn.backends.cpu.structs import Filled, Kind
from tkn.plan.lowering import Pending


@dataclass
class Map:
    """A map of one image in memory: a pixel's channels side by side or, if `planar`, a channel's pixels.

    `border`: zeros (above, left, below, right); `pixel`: numbers from one pixel to the next; `slack`: numbers at its
    end that loads may touch.
    """

    index: int
    channels: int
    size: tuple[int, int]
    border: tuple[int, int, int, int]
    planar: bool
    pixel: int
    slack: int
    begin: int
    #: what it holds where nothing is written: [C]
    outside: Float
    #: everything is written in each run
    rewritten: bool

    @property
    def line(self) -> int:
        """Numbers from one line to the next."""
        return (self.size[1] + self.border[1] + self.border[3]) * self.pixel

    @property
    def _lines(self) -> int:
        return (self.size[0] + self.border[0] + self.border[2]) * self.line

    @property
    def channel(self) -> int:
        """Numbers from one channel to the next."""
        return self._lines if self.planar else 1

    @property
    def length(self) -> int:
        """Numbers that it takes."""
        return self._lines * (self.channels if self.planar else 1) + self.slack

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


@dataclass(frozen=True, eq=False)
class MapValue(Pending):
    """An activation whose x is the channels of `parts` side by side.

    `mask`: bool [C, H, W], outside of which x is the constant `outside`.
    """

    parts: tuple[Map, ...]
    mask: Bool

    @property
    def size(self) -> tuple[int, int]:
        return self.parts[0].size

    @property
    def whole(self) -> Map | None:
        """The map, if it holds just this activation."""
        return self.parts[0] if len(self.parts) == 1 and not self.pending else None

    def live(self) -> Bool:
        """Where a map that holds it may not be zero: [C, H, W]."""
        constant: Bool = self.mask | (self.outside != 0)[:, None, None]
        return constant


@dataclass
class MapInstruction:
    """One instruction: its structure, where its maps begin, and into how many parts threads may divide it."""

    kind: Kind
    spec: Filled
    source: int
    output: int
    parts: int
    dense: int = 0
