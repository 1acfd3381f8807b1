"""Convolutions of maps whose pixels have their channels side by side: vectors over the channels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.backends.cpu.rows import Bool, Float, Int32, cumulative, pool_windows
from tkn.backends.cpu.structs import Filled, Kind, MapConvStruct, MapFirstStruct
from tkn.geometry import Geometry
from tkn.plan.fuse import Fused, pool_struct, single
from tkn.plan.graph import Convolve
from tkn.plan.maps import Map
from tkn.plan.pairing import paired_neighbours

#: Convolutions of fewer input channels are computed in vectors of output channels.
FEW = 8
#: Channels whose taps are read together: what a block of pixels reads of them stays in a near cache.
_TOGETHER = 256
#: Outputs of a set, and output pixels of a set: the tasks that threads divide.
_SET_OUTPUTS, _SET_PIXELS = 8, 32
#: Fewer outputs do not pay for the rounding of what they read.
_PAIRED_OUTPUTS = 8
#: What a multiplication of vectors costs, for each reads numbers of its own; and adding up the numbers of a sum.
_READING, _ADDING = 1.3, 12.0


def in_pairs(source: Map, conv: Convolve, vector: int) -> bool:
    """Whether products of pairs of bfloat16 are faster: of so many channels that there are fewer vectors of them."""
    enough = source.channels > vector and len(conv.weight) >= _PAIRED_OUTPUTS
    return enough and conv.groups == 1 and not _is_packed(source)


def channel_conv(
    fused: Fused, source: Map, target: Map, live: Bool, vector: int, *, pairs: bool = False
) -> tuple[Kind, Filled, Int32]:
    """Its kind and the work of each part too.

    `live`: [C, H, W], where the source may not be zero; `vector`: numbers of one; `pairs`: the source is of pairs of
    bfloat16 of neighbouring channels.
    """
    if pairs:
        fused = replace(fused, conv=replace(fused.conv, weight=paired_neighbours(fused.conv.weight)))
        live = np.logical_or.reduceat(live, np.arange(0, len(live), 2), axis=0)
    windows = _windows(fused)
    if _is_packed(source):
        spec = _first_conv(fused, source, target, windows, vector)
        return Kind.MAP_FIRST, spec, np.diff(spec.kept["chunk_start"]) + 1
    kind = Kind.MAP_CONV_PAIRS if pairs else Kind.MAP_CONV
    return kind, *_sets_conv(fused, source, target, windows, live, vector)


def _is_packed(source: Map) -> bool:
    """Whether nothing but the few channels of a pixel lies between it and the next."""
    return source.channels < FEW and source.depth == source.channels


def channel_cost(fused: Fused, source: Map, vector: int) -> float:
    """About how many multiplications of vectors take as long."""
    channels, taps = fused.conv.weight.shape[1], fused.conv.geometry.taps
    mask = fused.mask.reshape(len(fused.mask), -1)
    if _is_packed(source):
        chunks = sum(int(chunk.any(axis=0).sum()) for chunk in np.array_split(mask, range(vector, len(mask), vector)))
        return chunks * (channels * taps + 1) * _READING
    return int(mask.sum()) * (-(-channels // vector) * taps * _READING + _ADDING)


def _windows(fused: Fused) -> Int32:
    """The convolved pixels that each pixel of the output combines: [pixels, children]."""
    size = fused.conv.geometry.output_size
    return np.arange(size[0] * size[1])[:, None] if fused.pool is None else pool_windows(fused.pool, size)


def _corner(source: Map, geometry: Geometry, pixel: Int32) -> Int32:
    """Where the taps of output pixels begin, after the source's first pixel."""
    rows, columns = np.divmod(pixel, geometry.output_size[1])
    top, left = geometry.before
    rows, columns = rows * geometry.stride[0] - top, columns * geometry.stride[1] - left
    return (rows * source.line + columns * source.pixel).astype(np.int32)


def _first_conv(fused: Fused, source: Map, target: Map, windows: Int32, vector: int) -> Filled:
    g, weight = fused.conv.geometry, fused.conv.weight
    outputs, width = len(weight), -(-len(weight) // vector) * vector
    pixels, children = windows.shape
    pixel = windows.reshape(-1)
    values = np.zeros((2, pixels * children, width))
    mask = fused.mask.reshape(outputs, -1)
    values[0, :, :outputs] = np.where(mask, fused.scale.reshape(outputs, -1), 0)[:, pixel].T
    values[1, :, :outputs] = np.where(mask, fused.shift.reshape(outputs, -1), fused.before[:, None])[:, pixel].T
    alive = np.zeros((pixels, width), dtype=bool)
    alive[:, :outputs] = np.logical_or.reduce(mask[:, windows], axis=2).T
    chunks = alive.reshape(pixels, -1, vector).any(axis=2)
    taps = np.arange(g.kernel[0])[:, None] * g.dilation[0] * source.line
    taps = taps + np.arange(g.kernel[1]) * g.dilation[1] * source.pixel
    offsets = (taps.reshape(1, -1) + np.arange(source.channels)[:, None]).reshape(-1)
    packed = np.zeros((width, len(offsets)), dtype=np.float32)
    packed[:outputs] = weight.reshape(outputs, -1).numpy()
    return Filled(MapFirstStruct()).with_values(
        pixels=pixels,
        out=target.at(np.arange(pixels)),
        channels=outputs,
        out_channel=target.channel,
        child_start=(np.arange(pixels + 1) * children).astype(np.int32),
        source=_corner(source, g, pixel),
        chunk_start=cumulative(chunks.sum(axis=1)),
        chunk=np.nonzero(chunks)[1].astype(np.int32),
        scale=single(values[0]),
        shift=single(values[1]),
        width=width,
        taps=len(offsets),
        tap_offset=offsets.astype(np.int32),
        weight=np.ascontiguousarray(packed.reshape(-1, vector, len(offsets)).transpose(0, 2, 1)),
        pool=pool_struct(fused),
    )


def _sets_conv(fused: Fused, source: Map, target: Map, windows: Int32, live: Bool, vector: int) -> tuple[Filled, Int32]:
    g = fused.conv.geometry
    mask = fused.mask.reshape(len(fused.mask), -1)
    sets = list(_output_sets(mask, windows, np.logical_or.reduce(mask[:, windows], axis=2)))
    runs = _Runs(fused.conv, source, live, vector)
    spans = [runs.of(s.pixels) for s in sets]
    offsets, lengths, weights = (np.ascontiguousarray(row) for row in runs.joined())
    counts = [len(s.channels) * len(s.pixels) for s in sets]
    spec = Filled(MapConvStruct()).with_values(
        sets=len(sets),
        set_start=cumulative(np.array([len(s.channels) for s in sets], dtype=np.int64)),
        channel=_joined([s.channels for s in sets]),
        pixel_start=cumulative(np.array([len(s.pixels) for s in sets], dtype=np.int64)),
        source=_corner(source, g, _joined([s.pixels for s in sets])),
        value_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        scale=single(_joined([_at(fused.scale, s) for s in sets])),
        shift=single(_joined([_at(fused.shift, s) for s in sets])),
        out_start=cumulative(np.array([len(s.outs) for s in sets], dtype=np.int64)),
        out=target.at(_joined([s.outs for s in sets])),
        out_channel=target.channel,
        child_start=cumulative(_joined([s.children for s in sets])),
        child=_joined([s.child for s in sets]),
        missing=_joined([s.missing for s in sets]),
        outside=single(fused.outside),
        run_first=np.array([first for first, _ in spans], dtype=np.int32),
        runs=np.array([count for _, count in spans], dtype=np.int32),
        run_offset=offsets,
        run_length=lengths,
        run_weight=weights,
        weight=runs.weight,
        weight_dst=runs.weight.shape[1],
        pool=pool_struct(fused),
    )
    sums = np.array([lengths[first : first + count].sum() for first, count in spans])
    return spec, np.array(counts) * (sums // vector + int(_ADDING))


class _Runs:
    """What the taps of a set's pixels read, run by run, and the weights in that order: whole vectors of channels that
    are not zero at all of the pixels."""

    def __init__(self, conv: Convolve, source: Map, live: Bool, vector: int) -> None:
        g = self._geometry = conv.geometry
        blocks = range(0, source.pixel, _TOGETHER)
        self.weight = _packed(conv, source.pixel, blocks)
        # Of each vector of weights, in their order: its tap, and which vector of channels it multiplies.
        tap, chunk = [], []
        for begin in blocks:
            count = -(-min(_TOGETHER, source.pixel - begin) // vector)
            tap.append(np.repeat(np.arange(g.taps), count))
            chunk.append(np.tile(np.arange(count) + begin // vector, g.taps))
        self._tap, self._chunk = np.concatenate(tap), np.concatenate(chunk)
        ky, kx = np.divmod(self._tap, g.kernel[1])
        place = ky * g.dilation[0] * source.line + kx * g.dilation[1] * source.pixel
        self._offset, self._vector = place + self._chunk * vector, vector
        self._live = None if live.all() else self._chunks(live, source)
        self._known: dict[bytes, tuple[int, int]] = {}
        self._runs: list[Int32] = [np.zeros((3, 0), dtype=np.int64)]
        self._length = 0

    def _chunks(self, live: Bool, source: Map) -> Bool:
        """[vectors of channels, H, W with padding]"""
        g = self._geometry
        padding = [(before, after) for before, after in zip(g.before, g.after, strict=True)]
        padded = np.pad(live, [(0, source.pixel - source.channels), *padding])
        chunks: Bool = np.logical_or.reduce(padded.reshape(-1, self._vector, *padded.shape[1:]), axis=1)
        return chunks

    def of(self, pixels: Int32) -> tuple[int, int]:
        """The first run, and how many."""
        alive = np.ones(len(self._tap), dtype=bool) if self._live is None else self._alive(self._live, pixels)
        key = alive.tobytes()
        if key not in self._known:
            which = np.nonzero(alive)[0]
            follows = (np.diff(which) == 1) & (np.diff(self._offset[which]) == self._vector)
            begins = np.nonzero(np.concatenate([[True], ~follows]))[0] if len(which) else which
            lengths = np.diff(np.append(begins, len(which))) * self._vector
            self._known[key] = self._length, len(begins)
            self._runs.append(np.stack([self._offset[which[begins]], lengths, which[begins] * self._vector]))
            self._length += len(begins)
        return self._known[key]

    def _alive(self, live: Bool, pixels: Int32) -> Bool:
        g = self._geometry
        rows, columns = np.divmod(pixels, g.output_size[1])
        ky, kx = np.divmod(np.arange(g.taps), g.kernel[1])
        y = rows * g.stride[0] + (ky * g.dilation[0])[:, None]
        x = columns * g.stride[1] + (kx * g.dilation[1])[:, None]
        alive: Bool = np.logical_or.reduce(live[:, y, x], axis=2)[self._chunk, self._tap]
        return alive

    def joined(self) -> Int32:
        """Offsets, lengths and places of the weights: [3, runs]."""
        return np.concatenate(self._runs, axis=1).astype(np.int32)


def _packed(conv: Convolve, channels: int, blocks: range) -> Tensor:
    """The weights of each output: block by block of channels, tap by tap, zero beyond the real channels."""
    weight = conv.weight.permute(0, 2, 3, 1)
    if channels > weight.shape[3]:
        weight = F.pad(weight, (0, channels - weight.shape[3]))
    if conv.geometry.taps == 1 or len(blocks) == 1:  # as they are: those of fully connected layers are many
        return weight.reshape(len(weight), -1).contiguous()
    return torch.cat([weight[..., begin : begin + blocks.step].flatten(1) for begin in blocks], dim=1)


@dataclass(frozen=True, eq=False)
class _Set:
    """Outputs of one ROI, at some pixels; `child`: positions in `pixels`, as many for each of `outs` as `children`."""

    channels: Int32
    pixels: Int32
    outs: Int32
    children: Int32
    child: Int32
    missing: Int32


def _output_sets(mask: Bool, windows: Int32, live: Bool) -> list[_Set]:
    by_roi: dict[bytes, list[int]] = {}
    for channel, row in enumerate(np.packbits(mask, axis=1)):
        by_roi.setdefault(row.tobytes(), []).append(channel)
    sets = []
    for channels in by_roi.values():
        outs = np.nonzero(live[channels[0]])[0]
        for begin in range(0, len(outs), _SET_PIXELS):
            some = outs[begin : begin + _SET_PIXELS]
            inside = mask[channels[0]][windows[some]]
            pixels = windows[some][inside]
            for first in range(0, len(channels), _SET_OUTPUTS):
                chosen = np.array(channels[first : first + _SET_OUTPUTS], dtype=np.int32)
                count = inside.sum(axis=1).astype(np.int32)
                missing = (windows.shape[1] - count).astype(np.int32)
                child = np.arange(len(pixels), dtype=np.int32)
                sets.append(_Set(chosen, pixels.astype(np.int32), some.astype(np.int32), count, child, missing))
    return sets


def _at(values: Float, outputs: _Set) -> Float:
    """Of [O, H, W] those of a set, output by output."""
    rows, columns = np.divmod(outputs.pixels, values.shape[2])
    return values[outputs.channels[:, None], rows, columns].reshape(-1)


def _joined(arrays: list[Int32]) -> Int32:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
