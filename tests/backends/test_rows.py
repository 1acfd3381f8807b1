"""The lists that the kernels walk, on examples made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tkn.backends.cpu.rows import (
    Children,
    Rows,
    backward_taps,
    cumulative,
    forward_taps,
    pool_windows,
    pooled_order,
    slices,
    tile_lanes,
    tiles_of,
    window_table,
)
from tkn.geometry import Geometry, Pool


def mask_of(*channels: str) -> NDArray[np.bool_]:
    """One text per channel, lines apart by spaces: "x" is inside."""
    return np.array([[[mark == "x" for mark in line] for line in channel.split()] for channel in channels])


def test_rows_of_a_small_map() -> None:
    rows = Rows.of(mask_of("x. x.", "xx .."))
    assert (rows.channels, rows.size, rows.pixels, rows.live, rows.count) == (2, (2, 2), 4, 4, 4)
    assert rows.start.tolist() == [0, 2, 3, 4, 4]
    assert rows.channel.tolist() == [0, 1, 1, 0]
    assert rows.entry_position.tolist() == [0, 0, 1, 2]
    assert rows.base.tolist() == [0, 2, 3, 4]
    assert rows.row.tolist() == [0, 1, 2, 3]
    assert rows.dense.tolist() == [[0, -1, 3, -1], [1, 2, -1, -1]]


def test_rows_in_another_order() -> None:
    rows = Rows.of(mask_of("x. x.", "xx .."), np.array([2, 0, 3, 1], dtype=np.int32))
    assert rows.start.tolist() == [0, 1, 3, 3, 4]
    assert rows.channel.tolist() == [0, 0, 1, 1]
    assert rows.entry_position.tolist() == [0, 1, 1, 3]
    assert rows.dense.tolist() == [[1, -1, 0, -1], [2, 3, -1, -1]]


def test_pixels_of_eight_channels_are_set_apart() -> None:
    mask = np.zeros((16, 1, 3), dtype=bool)
    mask[:8, 0, 0] = mask[:3, 0, 1] = mask[:, 0, 2] = True
    rows = Rows.of(mask)
    assert rows.start.tolist() == [0, 8, 11, 27]
    assert rows.base.tolist() == [0, 9, 12]
    assert (rows.live, rows.count) == (27, 29)
    assert rows.row.tolist() == [*range(8), *range(9, 12), *range(12, 28)]


def test_no_rows() -> None:
    rows = Rows.of(np.zeros((3, 2, 2), dtype=bool))
    assert (rows.live, rows.count, rows.row.tolist()) == (0, 0, [])
    assert rows.dense.tolist() == [[-1] * 4] * 3
    table, base, chunks = rows.chunks(3, 9, 16, 4)
    assert (table.tolist(), base.tolist(), chunks) == ([[0] * 4] * 4, [0] * 4, 3)


def test_full_rows_are_made_once() -> None:
    assert Rows.full(3, (4, 5)) is Rows.full(3, (4, 5))
    assert Rows.full(3, (4, 5)).mask.all()


def test_chunks_of_channels() -> None:
    mask = np.ones((6, 1, 2), dtype=bool)
    mask[1, 0, 0] = mask[4, 0, 1] = False
    rows = Rows.of(mask)
    table, base, chunks = rows.chunks(2, 1, 16, 4)
    assert chunks == 2
    assert table.tolist() == [[0, 2, 5], [5, 8, 10]]
    assert base.tolist() == [0, 5]
    # As many bytes as four caches: four chunks, which do not cross groups.
    table, _, chunks = Rows.full(16, (1, 1)).chunks(2, 1, 2 * 4 * 256 * 1024 // 16 // 4, 4)
    assert chunks == 8
    assert table.tolist() == [[0, 2, 4, 6, 8, 10, 12, 14, 16]]


def test_cumulative() -> None:
    assert cumulative(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]
    assert cumulative(np.array([], dtype=np.int64)).tolist() == [0]
    with pytest.raises(ValueError, match="too many"):
        cumulative(np.array([2**30, 2**30]))


def test_taps_of_three_pixels() -> None:
    geometry = Geometry((1, 3), (1, 3), before=(0, 1), after=(0, 1))
    assert geometry.output_size == (1, 3)
    assert window_table(geometry).tolist() == [[-1, 0, 1], [0, 1, 2], [1, 2, -1]]
    start, pixel, tap = forward_taps(geometry, np.arange(3))
    assert start.tolist() == [0, 2, 5, 7]
    assert pixel.tolist() == [0, 1, 0, 1, 2, 1, 2]
    assert tap.tolist() == [1, 2, 0, 1, 2, 0, 1]
    start, pixel, tap = forward_taps(geometry, np.array([2, 0]))
    assert (start.tolist(), pixel.tolist(), tap.tolist()) == ([0, 2, 4], [1, 2, 0, 1], [0, 1, 1, 2])
    start, pixel, tap = backward_taps(geometry, np.array([2, 0, 1]))
    assert start.tolist() == [0, 2, 4, 7]
    assert pixel.tolist() == [1, 2, 0, 1, 0, 1, 2]
    assert tap.tolist() == [2, 1, 1, 0, 2, 1, 0]


def test_taps_of_a_stride_that_misses_a_pixel() -> None:
    geometry = Geometry((1, 4), (1, 1), stride=(1, 2))
    assert geometry.output_size == (1, 2)
    start, pixel, _ = backward_taps(geometry, np.arange(4))
    assert (start.tolist(), pixel.tolist()) == ([0, 1, 1, 2, 2], [0, 1])


GEOMETRIES = [
    Geometry((5, 7), (3, 3), before=(1, 1), after=(1, 1)),
    Geometry((6, 5), (2, 4), (2, 1), (0, 1), (1, 2)),
    Geometry((9, 8), (3, 2), (1, 3), (2, 0), (2, 0), (2, 3)),
    Geometry((4, 4), (4, 4)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometry_is_torchs(geometry: Geometry) -> None:
    (top, left), (bottom, right) = geometry.before, geometry.after
    x = torch.arange(geometry.input_size[0] * geometry.input_size[1], dtype=torch.float64).reshape(geometry.input_size)
    padded = nn.functional.pad(x + 1, (left, right, top, bottom))[None, None]
    taps = nn.functional.unfold(padded, geometry.kernel, geometry.dilation, stride=geometry.stride)[0].T - 1
    assert window_table(geometry).tolist() == taps.long().tolist()
    assert len(taps) == geometry.output_size[0] * geometry.output_size[1]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_forward_and_backward_taps_are_each_others_inverse(geometry: Geometry) -> None:
    generator = np.random.default_rng(0)
    outputs = generator.permutation(geometry.output_size[0] * geometry.output_size[1])
    inputs = generator.permutation(geometry.input_size[0] * geometry.input_size[1])

    def links(lists: tuple[NDArray, NDArray, NDArray], order: NDArray) -> list[tuple[int, int, int]]:
        start, pixel, tap = lists
        return [
            (int(own), int(pixel[at]), int(tap[at]))
            for position, own in enumerate(order)
            for at in range(start[position], start[position + 1])
        ]

    forward = links(forward_taps(geometry, outputs), outputs)
    backward = links(backward_taps(geometry, inputs), inputs)
    assert len(set(forward)) == len(forward) > 0
    assert sorted(forward) == sorted((output, source, tap) for source, output, tap in backward)


def test_pooling_of_a_map_with_an_odd_edge() -> None:
    pool = Pool((2, 2))
    assert pool_windows(pool, (3, 5)).tolist() == [[0, 1, 5, 6], [2, 3, 7, 8]]
    assert pooled_order(pool, (3, 5)).tolist() == [0, 1, 5, 6, 2, 3, 7, 8]
    assert pooled_order(None, (3, 5)) is None
    # Channel 0 in the first window only, channel 1 on the edge that no window holds, channel 2 in both.
    mask = mask_of("x.... x.... .....", "....x ..... xxxxx", ".xx.. ..x.. x....")
    children = Children.pooled(Rows.of(mask, pooled_order(pool, (3, 5))), pool)
    assert children.output.mask[:, 0].tolist() == [[True, False], [False, False], [True, True]]
    assert children.output.channel.tolist() == [0, 2, 2]
    assert children.start.tolist() == [0, 2, 3, 5]
    assert children.missing.tolist() == [2, 3, 2]
    # Entries of the source: (pixel 0, channel 0), (1, 2), (5, 0), (2, 2), (7, 2).
    assert children.source.channel.tolist() == [0, 2, 0, 2, 2]
    assert children.entry.tolist() == [0, 2, 1, 3, 4]
    assert children.window_starts().tolist() == [0, 4, 8]


def test_same_children() -> None:
    rows = Rows.of(mask_of("x. x.", "xx .."))
    children = Children.same(rows)
    assert children.output is rows
    assert children.start.tolist() == [0, 1, 2, 3, 4]
    assert children.entry.tolist() == [0, 1, 2, 3]
    assert children.missing.tolist() == [0] * 4


def test_overlapping_windows_with_padding() -> None:
    geometry = Geometry((1, 3), (1, 2), before=(0, 1), after=(0, 1))  # of pixels (-, 0), (0, 1), (1, 2), (2, -)
    source = Rows.of(mask_of("x..", "..."))
    children = Children.windows(source, geometry, np.array([False, True]))
    # Channel 1 is a constant, which the padding changes at both ends.
    assert children.output.mask.tolist() == [[[True, True, False, False]], [[True, False, False, True]]]
    assert children.output.channel.tolist() == [0, 1, 0, 1]
    assert children.start.tolist() == [0, 1, 1, 2, 2]
    assert children.entry.tolist() == [0, 0]
    assert children.missing.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("batch", "threads", "lanes"),
    [
        *[(1, 1, 16), (16, 1, 16), (17, 1, 32), (32, 1, 32), (33, 1, 64), (64, 1, 64), (128, 1, 64), (1000, 1, 64)],
        *[(17, 2, 16), (32, 2, 16), (33, 2, 32), (64, 2, 32), (65, 2, 64), (128, 2, 64), (128, 4, 32), (128, 8, 16)],
    ],
)
def test_lanes_of_a_tile(batch: int, threads: int, lanes: int) -> None:
    assert tile_lanes(batch, threads, 16) == lanes
    assert tiles_of(batch, lanes) * lanes >= batch > (tiles_of(batch, lanes) - 1) * lanes


def test_slices() -> None:
    assert list(slices(7, 3)) == [(0, 2), (2, 4), (4, 7)]
    assert list(slices(1, 2)) == [(0, 0), (0, 1)]
