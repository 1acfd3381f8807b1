"""The lists of a convolution inside its ROIs: for every tile of outputs the rows of the inputs that it reaches.

Made on the device, from the rows of both sides, in three passes: the box of pixels around what a tile reaches, how many
rows lie there, the rows themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkn.backends.cuda.reach import geometry_arguments, highest, lowest, tap
from tkn.backends.cuda.rows import TILE, Outgrown, Rows
from tkn.geometry import Geometry

#: Pixels of a box that a program looks at together.
_CHUNK = 32


@dataclass(frozen=True, eq=False)
class Lists:
    """Which rows of `inputs` every tile of 64 rows of `outputs` needs, `depth` of them to a block.

    With `flip` the outputs are the convolution's inputs, as for the gradient of these.

    Attributes:
        blocks: blocks there is place for.
        box: int32 [tiles, 4], the box of pixels around what a tile reaches: top, left, height, width.
        box_first: int32 [tiles + 1], where a tile's part of `offset` begins.
        offset: int32, for each pixel of a tile's box where its rows begin in the tile's list; -1 if not in it.
        first: int32 [tiles + 1], the first block of each tile, and the number of all.
        rows: int32 [blocks * depth], filled up with the zero row.
        tile_of: int32 [blocks].
    """

    inputs: Rows
    outputs: Rows
    geometry: Geometry
    flip: bool
    depth: int
    blocks: int
    box: Tensor
    box_first: Tensor
    offset: Tensor
    first: Tensor
    rows: Tensor
    tile_of: Tensor

    @staticmethod
    def of(
        inputs: Rows,
        outputs: Rows,
        geometry: Geometry,
        *,
        flip: bool = False,
        headroom: float = 1.0,
        like: Lists | None = None,
    ) -> Lists:
        """The lists of a convolution between rows, with place for `headroom` times as much, or of the sizes of `like`;
        `Outgrown` if these are too small. The host waits twice for the device."""
        device, tiles = outputs.pixel.device, outputs.tiles
        numbers = geometry_arguments(geometry)
        (height, width), output_width = inputs.size, outputs.size[1]
        box = torch.empty(tiles, 4, dtype=torch.int32, device=device)
        _box_kernel[(tiles,)](outputs.pixel, outputs.live, box, height, width, output_width, *numbers, flip, TILE)
        box_first = _starts(box[:, 2] * box[:, 3])
        boxed = int(box_first[-1])
        place = max(1, int(headroom * boxed)) if like is None else like.offset.numel()
        if boxed > place:
            raise Outgrown
        offset = torch.empty(place, dtype=torch.int32, device=device)
        total = torch.empty(tiles, dtype=torch.int32, device=device)
        _offset_kernel[(tiles,)](
            outputs.pixel,
            outputs.live,
            box,
            box_first,
            inputs.number,
            offset,
            total,
            width,
            output_width,
            *numbers,
            flip,
            TILE,
            _CHUNK,
        )
        listed = int(total.sum())
        depth = like.depth if like is not None else 64 if listed > 512 * tiles else 32
        first = _starts((total + depth - 1) // depth)
        # A tile leaves less than a block empty.
        most = listed // depth + tiles
        blocks = int(headroom * most) if like is None else like.blocks
        if most > blocks:
            raise Outgrown
        rows = torch.empty(blocks * depth, dtype=torch.int32, device=device)
        tile_of = torch.empty(blocks, dtype=torch.int32, device=device)
        _rows_kernel[(tiles,)](
            box,
            box_first,
            offset,
            total,
            first,
            inputs.first,
            inputs.number,
            rows,
            tile_of,
            inputs.capacity,
            width,
            depth,
        )
        return Lists(inputs, outputs, geometry, flip, depth, blocks, box, box_first, offset, first, rows, tile_of)

    @property
    def tiles(self) -> int:
        return self.outputs.tiles

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is on the device, without the rows' tables."""
        return self.box, self.box_first, self.offset, self.first, self.rows, self.tile_of


def _starts(numbers: Tensor) -> Tensor:
    """Where each of `numbers` begins, and where the last ends: [n] -> [n + 1]."""
    return torch.nn.functional.pad(numbers.cumsum(0, dtype=torch.int32), (1, 0))


@triton.jit
def _box_kernel(
    pixel, live, box, height, width, out_width, sy, sx, py, px, dy, dx, ky, kx, FLIP: tl.constexpr, TILE: tl.constexpr
):
    """The box of a tile; empty if its rows are unused or reach only padding."""
    tile = tl.program_id(0)
    e = tile * TILE + tl.arange(0, TILE)
    used = e < tl.load(live)
    at = tl.load(pixel + e)
    y, x = at // out_width, at % out_width
    top = tl.min(tl.where(used, lowest(y, sy, py, dy, ky, FLIP), height), 0)
    left = tl.min(tl.where(used, lowest(x, sx, px, dx, kx, FLIP), width), 0)
    bottom = tl.max(tl.where(used, highest(y, sy, py, dy, ky, height, FLIP), -1), 0)
    right = tl.max(tl.where(used, highest(x, sx, px, dx, kx, width, FLIP), -1), 0)
    tl.store(box + tile * 4, top)
    tl.store(box + tile * 4 + 1, left)
    tl.store(box + tile * 4 + 2, tl.maximum(bottom - top + 1, 0))
    tl.store(box + tile * 4 + 3, tl.maximum(right - left + 1, 0))


@triton.jit
def _offset_kernel(
    pixel,
    live,
    box,
    box_first,
    number,
    offset,
    total,
    width,
    out_width,
    sy,
    sx,
    py,
    px,
    dy,
    dx,
    ky,
    kx,
    FLIP: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For each pixel of a tile's box where its rows begin in the list, and how long the list is."""
    tile = tl.program_id(0)
    e = tile * TILE + tl.arange(0, TILE)
    used = e < tl.load(live)
    at = tl.load(pixel + e)
    y, x = at // out_width, at % out_width
    top, left = tl.load(box + tile * 4), tl.load(box + tile * 4 + 1)
    box_width = tl.load(box + tile * 4 + 3)
    area = tl.load(box + tile * 4 + 2) * box_width
    begin = tl.load(box_first + tile)
    so_far = 0
    for start in range(0, area, CHUNK):
        i = start + tl.arange(0, CHUNK)
        inside = i < area
        qy, qx = top + i // box_width, left + i % box_width
        ty = tap(y[:, None], qy[None, :], sy, py, dy, ky, FLIP)
        tx = tap(x[:, None], qx[None, :], sx, px, dx, kx, FLIP)
        reached = tl.max(((ty >= 0) & (tx >= 0) & used[:, None]).to(tl.int32), 0) > 0
        here = tl.load(number + qy * width + qx, mask=inside & reached, other=0)
        before = tl.cumsum(here, 0) - here
        tl.store(offset + begin + i, tl.where(here > 0, so_far + before, -1), mask=inside)
        so_far += tl.sum(here, 0)
    tl.store(total + tile, so_far)


@triton.jit
def _rows_kernel(
    box, box_first, offset, total, first, row_first, number, rows, tile_of, zero_row, width, DEPTH: tl.constexpr
):
    """A tile's list: the rows of each pixel in turn, then the zero row to the end of the block."""
    tile = tl.program_id(0)
    top, left = tl.load(box + tile * 4), tl.load(box + tile * 4 + 1)
    box_width = tl.load(box + tile * 4 + 3)
    area = tl.load(box + tile * 4 + 2) * box_width
    begin, block, end = tl.load(box_first + tile), tl.load(first + tile), tl.load(first + tile + 1)
    k = tl.arange(0, DEPTH)
    to = rows + block * DEPTH
    for i in range(0, area):
        at = tl.load(offset + begin + i)
        if at >= 0:
            q = (top + i // box_width) * width + left + i % box_width
            start, here = tl.load(row_first + q), tl.load(number + q)
            for j in range(0, here, DEPTH):
                tl.store(to + at + j + k, start + j + k, mask=j + k < here)
    left_over = tl.load(total + tile) + k
    tl.store(to + left_over, tl.zeros((DEPTH,), tl.int32) + zero_row, mask=left_over < (end - block) * DEPTH)
    for it in range(block, end):
        tl.store(tile_of + it, tile)
