"""From a graph's operations to the engine's for small batches: maps of one image, a pixel's channels side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tkn.backends.cpu.rows import Bool, Float, Int32, cumulative, pool_windows, window_table
from tkn.backends.cpu.structs import (
    MAX,
    SUM,
    Filled,
    Kind,
    MapConvStruct,
    MapDenseStruct,
    MapFirstStruct,
    MapGatherStruct,
    MapPickStruct,
    MapPoolStruct,
)
from tkn.geometry import Geometry
from tkn.plan.fuse import Following, Fused
from tkn.plan.graph import Convolve, Graph, Pooling
from tkn.plan.lowering import Lowering, Pending
from tkn.plan.nonlinearity import struct_of

#: Convolutions of fewer input channels are computed in vectors of output channels.
_FEW = 8
#: Channels whose taps are read together: what a block of pixels reads of them fits into a first-level cache.
_TOGETHER = 64
#: Outputs of a set, and output pixels of a set: the tasks that threads divide.
_SET_OUTPUTS, _SET_PIXELS = 8, 32


@dataclass
class Map:
    """A map of one image in memory. `border`: zeros (above, left, below, right)."""

    index: int
    channels: int
    size: tuple[int, int]
    border: tuple[int, int, int, int]
    stride: int
    begin: int
    #: what it holds where nothing is written: [C]
    outside: Float

    @property
    def line(self) -> int:
        return (self.size[1] + self.border[1] + self.border[3]) * self.stride

    @property
    def length(self) -> int:
        return (self.size[0] + self.border[0] + self.border[2]) * self.line

    @property
    def first(self) -> int:
        """Where pixel (0, 0) lies in memory."""
        return self.begin + self.border[0] * self.line + self.border[1] * self.stride

    def at(self, pixel: Int32) -> Int32:
        """Where pixels, as indices into H * W, lie after the first."""
        rows, columns = np.divmod(pixel, self.size[1])
        return (rows * self.line + columns * self.stride).astype(np.int32)


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


@dataclass
class MapInstruction:
    """One instruction: its structure, where its maps begin, and into how many parts threads may divide it."""

    kind: Kind
    spec: Filled
    source: int
    output: int
    parts: int
    dense: int = 0


class MapLowering(Lowering[MapValue]):
    """For small batches."""

    def __init__(self, graph: Graph, nodes: list[int], inputs: list[int], outputs: list[int], width: int) -> None:
        super().__init__(graph, nodes, inputs, outputs)
        self.width = width
        self.borders: dict[int, tuple[int, int, int, int]] = {}
        # Twice: how wide the borders must be is known once all readers are.
        for _ in range(2):
            self.maps: list[Map] = []
            self.instructions: list[MapInstruction] = []
            self._walk()
            if self.memory_size >= 2**31:
                raise ValueError(f"maps of {self.memory_size} numbers are too large for lists of 32 bits")

    @property
    def memory_size(self) -> int:
        """Numbers of one image's maps, and a vector more, which loads may touch."""
        return self.maps[-1].begin + self.maps[-1].length + self.width

    def memory(self) -> torch.Tensor:
        """One image's maps before the first run: zeros, and the constants outside of ROIs."""
        memory = np.zeros(self.memory_size, dtype=np.float32)
        for m in self.maps:
            if m.outside.any():
                place = m.first + m.at(np.arange(m.size[0] * m.size[1]))
                memory[place[:, None] + np.arange(m.channels)] = m.outside
        return torch.from_numpy(memory)

    def _map(self, channels: int, size: tuple[int, int], outside: Float | None = None) -> Map:
        index = len(self.maps)
        begin = self.maps[-1].begin + self.maps[-1].length if self.maps else 0
        begin = -(-begin // self.width) * self.width
        border = self.borders.get(index, (0, 0, 0, 0))
        made = Map(index, channels, size, border, self._padded(channels), begin, np.zeros(channels))
        if outside is not None:
            made.outside = outside
        self.maps.append(made)
        return made

    def _padded(self, channels: int) -> int:
        return -(-channels // self.width) * self.width

    def _need_border(self, source: Map, geometry: Geometry) -> None:
        before = self.borders.get(source.index, (0, 0, 0, 0))
        # The last taps of the last pixels: the padding may not be read to its end.
        needed = (*geometry.before, *geometry.after)
        top, left, bottom, right = (max(old, new) for old, new in zip(before, needed, strict=True))
        self.borders[source.index] = (top, left, bottom, right)

    def _pack(self, position: int) -> None:
        size = self.graph.nodes[position].size
        assert size is not None
        target = self._map(size[0], size[1:])
        if size[0] < _FEW:
            target.stride = size[0]
        self._add(Kind.MAP_PACK, _dense(target), 0, target.first, size[1], dense=self.inputs.index(position))
        self.values[position] = MapValue((target,), np.ones(size, dtype=bool), outside=np.zeros(size[0]))

    def _unpack(self, position: int, dense: int) -> None:
        source = self._materialised(self.values[position]).parts[0]
        self._add(Kind.MAP_UNPACK, _dense(source), source.first, 0, source.size[0], dense=dense)

    def _add(self, kind: Kind, spec: Filled, source: int, output: int, parts: int, dense: int = 0) -> None:
        self.instructions.append(MapInstruction(kind, spec, source, output, parts, dense))

    def _concatenated(self, parts: list[MapValue]) -> MapValue:
        return MapValue(
            tuple(m for part in parts for m in part.parts),
            np.concatenate([part.mask for part in parts]),
            outside=np.concatenate([part.outside for part in parts]),
        )

    def _materialised(self, value: MapValue) -> MapValue:
        return value if value.whole is not None else self._gather([value], None)

    def _gather(self, sources: list[MapValue], pooling: Pooling | None) -> MapValue:
        if len(sources) > 1:
            sources = [self._materialised(source) for source in sources]
        value = sources[0]
        parts = [part for source in sources for part in source.parts]
        size = value.size if pooling is None else pooling.geometry.output_size
        target = self._map(len(value.mask), size)
        pixels = np.arange(size[0] * size[1])
        table = pixels[:, None] if pooling is None else window_table(pooling.geometry)
        inside = table >= 0
        children = [part.first + part.at(np.where(inside, table, 0))[inside] for part in parts]
        channels = np.array([part.channels for part in parts], dtype=np.int32)
        factor = 1 / pooling.geometry.taps if pooling is not None and pooling.average else None
        spec = Filled(MapGatherStruct()).with_values(
            pixels=size[0] * size[1],
            out=target.at(pixels),
            parts=len(parts),
            channels=channels,
            first=np.zeros_like(channels) if len(sources) > 1 else cumulative(channels)[:-1].copy(),
            child_start=cumulative(inside.sum(axis=1)),
            child=np.stack(children).astype(np.int32),
            children=int(inside.sum()),
            scale=_single(value.scale),
            shift=_single(value.shift),
            sum=len(sources) > 1,
            pool=MapPoolStruct(SUM if factor else MAX, struct_of(value.function), factor or 1.0),
        )
        self._add(Kind.MAP_GATHER, spec, 0, target.first, size[0] * size[1])
        constants = np.sum([source.constants() for source in sources], axis=0)
        if pooling is not None:
            mask = np.ones((len(value.mask), *size), dtype=bool)
        else:
            mask = np.logical_or.reduce([source.mask for source in sources])
        return MapValue((target,), mask, outside=constants)

    def _convolution(self, position: int, conv: Convolve, value: MapValue) -> None:
        following = Following(self.graph, position, self.own, set(self.outputs))
        pooling = following.average_before(conv)
        if pooling is not None:
            value = self._gather([value], pooling)
            conv = replace(conv, geometry=replace(conv.geometry, input_size=value.size))
        value = self._materialised(value)
        g = conv.geometry
        pick = g.output_size == (1, 1) and g.kernel == g.input_size and not value.mask.all()
        # Else the map holds the constants, and the convolution adds them as it goes.
        fused = following.fuse(conv, value.mask, value.constants() if pick else np.zeros(len(value.mask)))
        if pick:
            value, fused = self._picked(value, fused)
        source = value.parts[0]
        self._need_border(source, fused.conv.geometry)
        pool = fused.pool
        size = g.output_size if pool is None else pool.output_size(g.output_size)
        target = self._map(len(fused.mask), size, fused.outside)
        windows = np.arange(size[0] * size[1])[:, None] if pool is None else pool_windows(pool, g.output_size)
        live: Bool = np.logical_or.reduce(fused.mask.reshape(len(fused.mask), -1)[:, windows], axis=2)
        result = MapValue((target,), live.reshape(-1, *size), outside=fused.outside)
        if not live.any():
            pass  # the map holds its constants
        elif source.channels < _FEW and source.stride == source.channels:
            self._first(fused, source, target, windows, live)
        else:
            self._sets(fused, source, target, windows, live)
        for done in fused.nodes:
            self.values[done] = result

    def _picked(self, value: MapValue, fused: Fused) -> tuple[MapValue, Fused]:
        """A fully connected layer reads only the inputs that are not always the same."""
        source, mask = value.parts[0], value.mask
        channel, pixel = np.nonzero(mask.reshape(len(mask), -1))
        if len(channel) == 0:  # then a zero is read
            channel, pixel = np.zeros((2, 1), dtype=np.int64)
            weight = torch.zeros(len(fused.conv.weight), 1, 1, 1)
        else:
            weight = fused.conv.weight[:, torch.from_numpy(mask)][:, :, None, None]
        target = self._map(len(channel), (1, 1))
        spec = Filled(MapPickStruct()).with_values(
            count=len(channel), source=(source.at(pixel) + channel).astype(np.int32)
        )
        self._add(Kind.MAP_PICK, spec, source.first, target.first, len(channel))
        conv = Convolve(weight, None, Geometry((1, 1), (1, 1)))
        picked = MapValue((target,), np.ones((len(channel), 1, 1), dtype=bool), outside=np.zeros(len(channel)))
        return picked, replace(fused, conv=conv)

    def _corner(self, source: Map, geometry: Geometry, pixel: Int32) -> Int32:
        """Where the taps of output pixels begin, after the source's first pixel."""
        rows, columns = np.divmod(pixel, geometry.output_size[1])
        top, left = geometry.before
        rows, columns = rows * geometry.stride[0] - top, columns * geometry.stride[1] - left
        return (rows * source.line + columns * source.stride).astype(np.int32)

    def _first(self, fused: Fused, source: Map, target: Map, windows: Int32, live: Bool) -> None:
        g, weight = fused.conv.geometry, fused.conv.weight
        outputs, width = len(weight), self._padded(len(weight))
        pixels, children = windows.shape
        pixel = windows.reshape(-1)
        values = np.zeros((2, pixels * children, width))
        mask = fused.mask.reshape(outputs, -1)
        values[0, :, :outputs] = np.where(mask, fused.scale.reshape(outputs, -1), 0)[:, pixel].T
        values[1, :, :outputs] = np.where(mask, fused.shift.reshape(outputs, -1), fused.before[:, None])[:, pixel].T
        alive = np.zeros((pixels, width), dtype=bool)
        alive[:, :outputs] = live.T
        chunks = alive.reshape(pixels, -1, self.width).any(axis=2)
        taps = np.arange(g.kernel[0])[:, None] * g.dilation[0] * source.line
        taps = taps + np.arange(g.kernel[1]) * g.dilation[1] * source.stride
        offsets = (taps.reshape(1, -1) + np.arange(source.channels)[:, None]).reshape(-1)
        packed = np.zeros((width, len(offsets)), dtype=np.float32)
        packed[:outputs] = weight.reshape(outputs, -1).numpy()
        spec = Filled(MapFirstStruct()).with_values(
            pixels=pixels,
            out=target.at(np.arange(pixels)),
            child_start=(np.arange(pixels + 1) * children).astype(np.int32),
            source=self._corner(source, g, pixel),
            chunk_start=cumulative(chunks.sum(axis=1)),
            chunk=np.nonzero(chunks)[1].astype(np.int32),
            scale=_single(values[0]),
            shift=_single(values[1]),
            width=width,
            taps=len(offsets),
            tap_offset=offsets.astype(np.int32),
            weight=np.ascontiguousarray(packed.reshape(-1, self.width, len(offsets)).transpose(0, 2, 1)),
            pool=_pool(fused),
        )
        self._add(Kind.MAP_FIRST, spec, source.first, target.first, pixels)

    def _sets(self, fused: Fused, source: Map, target: Map, windows: Int32, live: Bool) -> None:
        g = fused.conv.geometry
        mask = fused.mask.reshape(len(fused.mask), -1)
        sets = list(_output_sets(mask, windows, live))
        scale, shift = fused.scale.reshape(len(mask), -1), fused.shift.reshape(len(mask), -1)
        runs, lengths, weight = self._runs(fused.conv, source)
        counts = [len(s.channels) * len(s.pixels) for s in sets]
        spec = Filled(MapConvStruct()).with_values(
            sets=len(sets),
            set_start=cumulative(np.array([len(s.channels) for s in sets], dtype=np.int64)),
            channel=_joined([s.channels for s in sets]),
            pixel_start=cumulative(np.array([len(s.pixels) for s in sets], dtype=np.int64)),
            source=self._corner(source, g, _joined([s.pixels for s in sets])),
            value_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            scale=_single(np.concatenate([scale[s.channels][:, s.pixels].reshape(-1) for s in sets])),
            shift=_single(np.concatenate([shift[s.channels][:, s.pixels].reshape(-1) for s in sets])),
            out_start=cumulative(np.array([len(s.outs) for s in sets], dtype=np.int64)),
            out=target.at(_joined([s.outs for s in sets])),
            child_start=cumulative(_joined([s.children for s in sets])),
            child=_joined([s.child for s in sets]),
            missing=_joined([s.missing for s in sets]),
            outside=_single(fused.outside),
            runs=len(runs),
            run_offset=runs,
            run_length=lengths,
            weight=weight,
            weight_dst=weight.shape[1],
            pool=_pool(fused),
        )
        self._add(Kind.MAP_CONV, spec, source.first, target.first, len(sets))

    def _runs(self, conv: Convolve, source: Map) -> tuple[Int32, Int32, Float]:
        """What a pixel's taps read, run by run, and the weights in that order."""
        g = conv.geometry
        packed = conv.weight.permute(0, 2, 3, 1)
        if source.stride > source.channels:
            packed = F.pad(packed, (0, source.stride - source.channels))
        padded = packed.contiguous().numpy()
        one_pixel = g.output_size == (1, 1)  # no other pixel would find what a block has read in the cache
        if g.dilation[1] == 1 and (one_pixel or source.stride <= _TOGETHER):  # neighbours in memory
            lines = np.arange(g.kernel[0]) * g.dilation[0] * source.line
            lengths = np.full(g.kernel[0], g.kernel[1] * source.stride)
            return lines.astype(np.int32), lengths.astype(np.int32), padded.reshape(len(padded), -1)
        offsets, counts, weights = [], [], []
        for begin in range(0, source.stride, _TOGETHER):
            end = min(begin + _TOGETHER, source.stride)
            for y in range(g.kernel[0]):
                line = y * g.dilation[0] * source.line
                for x in range(g.kernel[1]):
                    offsets.append(line + x * g.dilation[1] * source.stride + begin)
                    counts.append(end - begin)
                    weights.append(padded[:, y, x, begin:end])
        return np.array(offsets, dtype=np.int32), np.array(counts, dtype=np.int32), np.concatenate(weights, axis=1)


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


def _pool(fused: Fused) -> MapPoolStruct:
    average = fused.pool is not None and fused.pool.average
    factor = 1 / (fused.pool.kernel[0] * fused.pool.kernel[1]) if average and fused.pool is not None else 1.0
    return MapPoolStruct(SUM if average else MAX, struct_of(fused.function), factor)


def _dense(m: Map) -> Filled:
    return Filled(MapDenseStruct()).with_values(
        channels=m.channels, height=m.size[0], width=m.size[1], stride=m.stride, line=m.line
    )


def _joined(arrays: list[Int32]) -> Int32:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)


def _single(values: Any) -> Any:
    return None if values is None else np.ascontiguousarray(values, dtype=np.float32)
