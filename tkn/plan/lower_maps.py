"""From a graph's operations to the engine's for small batches: maps of one image, in either order of their numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from tkn.backends.cpu.rows import Bool, Float, Int32, cumulative, window_table
from tkn.backends.cpu.structs import (
    MAX,
    PRODUCT,
    SUM,
    Filled,
    Kind,
    MapDenseStruct,
    MapGatherStruct,
    MapNormStruct,
    MapPairingStruct,
    MapPickStruct,
    MapPoolStruct,
    MapSelectStruct,
    PlaneGatherStruct,
    PlaneResampleStruct,
)
from tkn.geometry import Geometry
from tkn.plan.channel_convs import FEW, channel_conv, channel_cost, in_pairs
from tkn.plan.dense import is_linear
from tkn.plan.fuse import Following, Fused, single
from tkn.plan.graph import ChannelNorm, Convolve, Graph, Pooling
from tkn.plan.lowering import Lowering, normalised
from tkn.plan.maps import Map, MapInstruction, MapValue, Order
from tkn.plan.nonlinearity import struct_of
from tkn.plan.plane_convs import plane_conv, plane_cost, window_fields
from tkn.plan.resampling import Axis, windows

#: Lines of a plane that are gathered in one go.
_BAND = 8
#: The planar map's advantage where only planar maps can be read.
_MUST = 1e18


class MapLowering(Lowering[MapValue]):
    """For small batches.

    A first walk finds what the readers of each map want: how wide its border must be, and whether its numbers should
    lie pixel by pixel or, planar, channel by channel. A second one makes the instructions. Maps of which everything is
    written anew in each run share memory with others of the same form that are no longer read.

    `pairs`: convolutions over the channels multiply pairs of bfloat16 where that is faster.
    """

    def __init__(
        self, graph: Graph, nodes: list[int], inputs: list[int], outputs: list[int], width: int, *, pairs: bool = False
    ) -> None:
        super().__init__(graph, nodes, inputs, outputs)
        self.width, self._pairs = width, pairs
        self._borders: dict[int, tuple[int, int, int, int]] = {}
        self._slack: dict[int, int] = {}
        self._alike = _Alike()
        self._fused: dict[int, Fused] = {}
        #: the last map that is made from one
        self.read_until: dict[int, int] = {}
        self._begins: list[int] = []
        for final in (False, True):
            self._final = final
            self.maps: list[Map] = []
            self.instructions: list[MapInstruction] = []
            self._made: dict[MapValue, MapValue] = {}
            #: of maps, by their index, the same in pairs; and the other way round
            self._paired: dict[int, Map] = {}
            self._unpaired: dict[int, Map] = {}
            self._walk()
            if not final:
                self._begins = _places([self._laid(m) for m in self.maps], self.read_until, self.width)
        self._fused.clear()
        self._made.clear()
        if self.memory_size >= 2**31:
            raise ValueError(f"maps of {self.memory_size} numbers are too large for lists of 32 bits")

    @property
    def memory_size(self) -> int:
        """Numbers of one image's maps, and a vector more, which loads may touch."""
        return max(m.end for m in self.maps) + self.width

    def memory(self) -> torch.Tensor:
        """One image's maps before the first run: zeros, and the constants outside of ROIs."""
        memory = np.zeros(self.memory_size, dtype=np.float32)
        for m in self.maps:
            if m.outside.any() and not m.rewritten:
                place = m.first + m.at(np.arange(m.size[0] * m.size[1]))
                memory[place[:, None] + np.arange(m.channels) * m.channel] = m.outside
        return torch.from_numpy(memory)

    def _map(
        self,
        channels: int,
        size: tuple[int, ...],
        outside: Float | None = None,
        *,
        rewritten: bool = True,
        packed: bool = False,
    ) -> Map:
        """`packed`: the few channels of a pixel are all that lies between it and the next."""
        index = len(self.maps)
        depth = channels if packed else -(-channels // self.width) * self.width
        constants = np.zeros(channels) if outside is None else outside
        begin = self._begins[index] if self._final else 0
        made = Map(index, channels, size, (0, 0, 0, 0), Order.PIXELS, depth, 0, begin, constants, rewritten)
        self.maps.append(self._laid(made) if self._final else made)
        return self.maps[-1]

    def _laid(self, m: Map) -> Map:
        """As its readers want it."""
        source = self._unpaired.get(m.index)
        if source is not None and self._alike.advantage(source.index) > 0:  # nobody reads it
            return replace(m, depth=0, slack=0)
        order = Order.PIXELS
        if self._alike.advantage(m.index) > 0:
            # By lines a thread's share is one piece of memory; whole planes can be read as one long line.
            order = Order.LINES if m.size[1] >= self.width else Order.PLANES
        border, slack = self._borders.get(m.index, (0, 0, 0, 0)), self._slack.get(m.index, self.width)
        return replace(m, border=border, order=order, slack=slack)

    def _read(self, source: Map, geometry: Geometry) -> None:
        """Say that a convolution of this geometry reads a map."""
        before = self._borders.get(source.index, (0, 0, 0, 0))
        # The last taps of the last pixels: the padding may not be read to its end.
        needed = (*geometry.before, *geometry.after)
        top, left, bottom, right = (max(old, new) for old, new in zip(before, needed, strict=True))
        self._borders[source.index] = (top, left, bottom, right)
        self._touch(source, geometry.stride[1])

    def _touch(self, source: Map, stride: int) -> None:
        """Say that vectors of every `stride`-th number are loaded from it."""
        self._slack[source.index] = max(self._slack.get(source.index, 0), (stride + 1) * self.width)

    def _pack(self, position: int) -> None:
        size = self.graph.nodes[position].size
        assert size is not None
        target = self._map(size[0], size[1:], packed=size[0] < FEW)
        self._add(Kind.MAP_PACK, _dense(target), 0, target.first, size[1], dense=self.inputs.index(position))
        self.values[position] = MapValue((target,), np.ones(size, dtype=bool), outside=np.zeros(size[0]))

    def _unpack(self, position: int, dense: int) -> None:
        source = self._materialised(self.values[position]).parts[0]
        self.read_until[source.index] = len(self.graph.nodes) + len(self.maps)  # after all others
        self._add(Kind.MAP_UNPACK, _dense(source), source.first, 0, source.size[0], dense=dense)

    def _add(
        self, kind: Kind, spec: Filled, source: int, output: int, parts: int, dense: int = 0, work: Int32 | None = None
    ) -> None:
        if work is not None:
            work = np.concatenate([[0], np.cumsum(work)]).astype(np.int64)
        self.instructions.append(MapInstruction(kind, spec, source, output, parts, dense, work))

    def _concatenated(self, parts: list[MapValue]) -> MapValue:
        before = cumulative(np.array([sum(m.channels for m in part.parts) for part in parts]))
        chosen = [part.all_channels() + first for part, first in zip(parts, before[:-1], strict=True)]
        return MapValue(
            tuple(m for part in parts for m in part.parts),
            np.concatenate([part.mask for part in parts]),
            None if all(part.channels is None for part in parts) else np.concatenate(chosen),
            outside=np.concatenate([part.outside for part in parts]),
        )

    def _resampled(self, value: MapValue, lines: Axis, columns: Axis, *, maximum: bool) -> MapValue:
        value = value if value.channels is None else self._materialised(value)
        size = len(lines.first), len(columns.first)
        target = self._map(len(value.mask), size)
        for part in value.parts:
            self._alike.join(part.index, value.parts[0].index)
            self._touch(part, 1)
            self.read_until[part.index] = target.index
        self._alike.follow(value.parts[0].index, target.index)
        if self._final:
            if not maximum and target.planar and value.parts[0].planar:
                band = _BAND if target.order is Order.LINES else size[0]
                spec = _plane_resample(value, lines, columns, target, band)
                self._add(Kind.PLANE_RESAMPLE, spec, 0, target.first, target.channels * -(-size[0] // band))
            else:
                table, weight = windows(lines, columns, value.size[1])
                pool = MapPoolStruct(MAX if maximum else SUM, struct_of(value.function), 1.0)
                weights = None if maximum else weight
                spec = _map_gather(value, list(value.parts), 0, table, target, pool, weights)
                self._add(Kind.MAP_GATHER, spec, 0, target.first, size[0] * size[1])
        return MapValue((target,), np.ones((len(value.mask), *size), dtype=bool), outside=value.constants())

    def _normalised(self, value: MapValue, norm: ChannelNorm) -> MapValue:
        source = self._materialised(value).parts[0]
        target = self._map(source.channels, source.size)
        self._alike.join(target.index, source.index)
        self._touch(source, 1)
        self.read_until[source.index] = target.index
        if self._final:
            spec = _map_norm(norm, source, target)
            self._add(Kind.MAP_NORM, spec, source.first, target.first, source.size[0])
        return MapValue((target,), np.ones_like(value.mask), outside=normalised(norm, value.outside))

    def _selected(self, value: MapValue, channels: Int32) -> MapValue:
        chosen = value.all_channels()[channels]
        before = cumulative(np.array([part.channels for part in value.parts]))
        part = np.searchsorted(before, chosen, side="right") - 1
        used, place = np.unique(part, return_inverse=True)
        parts = tuple(value.parts[index] for index in used)
        chosen = chosen - before[part] + cumulative(np.array([one.channels for one in parts]))[place]
        channels_of_parts = np.arange(sum(one.channels for one in parts))
        left = None if np.array_equal(chosen, channels_of_parts) else chosen
        return replace(value.of_channels(channels), parts=parts, mask=value.mask[channels], channels=left)

    def _materialised(self, value: MapValue) -> MapValue:
        if value.whole is not None:
            return value
        if value not in self._made:
            self._made[value] = self._gather([value], None)
        return self._made[value]

    def _gather(self, sources: list[MapValue], pooling: Pooling | None) -> MapValue:
        if len(sources) > 1:
            sources = [self._materialised(source) for source in sources]
        elif pooling is not None and sources[0].channels is not None:
            sources = [self._gather(sources, None)]
        value = sources[0]
        target = self._combined(sources, pooling, SUM if len(sources) > 1 else 0)
        size = target.size
        constants = np.sum([source.constants() for source in sources], axis=0)
        if pooling is not None:
            mask = np.ones((len(value.mask), *size), dtype=bool)
        else:
            mask = np.logical_or.reduce([source.mask for source in sources])
        return MapValue((target,), mask, outside=constants)

    def _product(self, value: MapValue, factor: MapValue) -> MapValue:
        target = self._combined([value, factor], None, PRODUCT)
        return MapValue((target,), value.live(), outside=np.zeros(len(value.mask)))

    def _combined(self, sources: list[MapValue], pooling: Pooling | None, how: int) -> Map:
        """`how`: SUM or PRODUCT of the sources, or 0 for the pooling or channels of one. A factor may be one pixel."""
        value = sources[0]
        parts = [part for source in sources for part in source.parts]
        geometry = Geometry(value.size, (1, 1)) if pooling is None else pooling.geometry
        size = geometry.output_size
        target = self._map(len(value.mask), size)
        for part in parts:
            if part.size == value.size:
                self._alike.join(part.index, parts[0].index)
            self._touch(part, geometry.stride[1])
            self.read_until[part.index] = target.index
        if pooling is None:
            self._alike.join(target.index, parts[0].index)
        else:
            self._alike.follow(parts[0].index, target.index)
        if self._final:
            average = pooling is not None and pooling.average
            pool = MapPoolStruct(
                SUM if average else MAX, struct_of(value.function), 1 / geometry.taps if average else 1.0
            )
            if target.planar and all(part.planar for part in parts if part.size == value.size):
                band = _BAND if target.order is Order.LINES else size[0]
                spec = _plane_gather(value, parts, how, geometry, target, band, pool)
                self._add(Kind.PLANE_GATHER, spec, 0, target.first, target.channels * -(-size[0] // band))
            elif value.channels is not None:
                spec = _map_select(value, target, pool)
                self._add(Kind.MAP_SELECT, spec, 0, target.first, size[0] * size[1])
            else:
                spec = _map_gather(value, parts, how, window_table(geometry), target, pool)
                self._add(Kind.MAP_GATHER, spec, 0, target.first, size[0] * size[1])
        return target

    def _convolution(self, position: int, conv: Convolve, value: MapValue) -> None:
        following = Following(self.graph, position, self.own, set(self.outputs))
        pooling = following.average_before(conv)
        if pooling is not None:
            value = self._gather([value], pooling)
            conv = replace(conv, geometry=replace(conv.geometry, input_size=value.size))
        value = self._materialised(value)
        g = conv.geometry
        pick = is_linear(conv) and g.kernel != (1, 1)
        if position not in self._fused:
            # Of other maps, which hold the constants, a convolution adds them as it goes.
            constants = value.constants() if pick else np.zeros(len(value.mask))
            self._fused[position] = following.fuse(conv, value.mask, constants)
        fused = self._fused[position]
        live = value.live()
        if pick:
            value, fused = self._picked(value, fused)
            live = value.mask
        source = value.parts[0]
        self._read(source, fused.conv.geometry)
        paired = self._in_pairs(source, fused.conv)
        if not self._final:
            self._alike.add(source.index, self._advantage(fused, source, pairs=paired is not None))
        mask = _pooled_mask(fused)
        target = self._map(len(mask), fused.size, fused.outside, rewritten=bool(mask.all()))
        self.read_until[source.index] = target.index
        if paired is not None:
            self.read_until[paired.index] = target.index
        if self._final and mask.any():  # else the map holds its constants
            if source.planar:
                corner = source.first - g.before[0] * source.line - g.before[1]
                spec, work = plane_conv(fused, source, target, live, self.width)
                self._add(Kind.PLANE_CONV, spec, corner, target.first, len(work), work=work)
            else:
                if paired is not None:
                    source = paired
                kind, spec, work = channel_conv(fused, source, target, live, self.width, pairs=paired is not None)
                self._add(kind, spec, source.first, target.first, len(work), work=work)
        result = MapValue((target,), mask, outside=fused.outside)
        for done in fused.nodes:
            self.values[done] = result

    def _in_pairs(self, source: Map, conv: Convolve) -> Map | None:
        """The source in pairs of bfloat16, made before its first reader, if the convolution is faster on it."""
        if not self._pairs or not in_pairs(source, conv, self.width):
            return None
        if source.index not in self._paired:
            index = len(self.maps)
            self._unpaired[index] = source
            made = self._paired[source.index] = self._map(-(-source.channels // 2), source.size)
            if self._final and not source.planar:
                spec = Filled(MapPairingStruct()).with_values(
                    columns=source.size[1],
                    line=source.line,
                    pixel=source.pixel,
                    pair_line=made.line,
                    pair_pixel=made.pixel,
                )
                self._add(Kind.MAP_PAIR, spec, source.first, made.first, source.size[0])
        paired = self._paired[source.index]
        self._read(paired, conv.geometry)
        return paired

    def _advantage(self, fused: Fused, source: Map, *, pairs: bool) -> float:
        """How much less work a convolution is if its source is planar; `pairs`: else it is read in pairs."""
        if fused.conv.groups > 1:
            return _MUST
        if source.size == (1, 1):
            return -_MUST / 1e6
        return channel_cost(fused, source, self.width * (1 + pairs)) - plane_cost(fused, self.width)

    def _picked(self, value: MapValue, fused: Fused) -> tuple[MapValue, Fused]:
        """A fully connected layer reads the inputs that are not always the same, side by side."""
        source, mask = value.parts[0], value.mask
        channel, pixel = np.nonzero(mask.reshape(len(mask), -1))
        if len(channel) == 0:  # then a zero is read
            channel, pixel = np.zeros((2, 1), dtype=np.int64)
            weight = torch.zeros(len(fused.conv.weight), 1, 1, 1)
        elif mask.all():
            weight = fused.conv.weight.reshape(len(fused.conv.weight), -1, 1, 1)
        else:
            weight = fused.conv.weight[:, torch.from_numpy(mask)][:, :, None, None]
        target = self._map(len(channel), (1, 1))
        self.read_until[source.index] = target.index
        spec = Filled(MapPickStruct()).with_values(
            count=len(channel), source=(source.at(pixel) + channel * source.channel).astype(np.int32)
        )
        self._add(Kind.MAP_PICK, spec, source.first, target.first, len(channel))
        conv = Convolve(weight, None, Geometry((1, 1), (1, 1)))
        picked = MapValue((target,), np.ones((len(channel), 1, 1), dtype=bool), outside=np.zeros(len(channel)))
        return picked, replace(fused, conv=conv)


def _places(maps: list[Map], read_until: dict[int, int], width: int) -> list[int]:
    """Where each begins: in the place of an earlier one of the same form that nothing reads any more, or after all."""
    regions: dict[tuple[object, ...], list[list[Map]]] = {}
    for m in maps:
        form: tuple[object, ...] = (m.order, m.size, m.border, m.pixel, m.order is Order.PLANES or m.channels)
        alike = regions.setdefault(form if m.rewritten else (m.index,), [])
        free = (region for region in alike if read_until.get(region[-1].index, -1) < m.index)
        region = next(free, None)
        if region is None:
            alike.append([m])
        else:
            region.append(m)
    begins, begin = [0] * len(maps), 0
    for alike in regions.values():
        for region in alike:
            for m in region:
                begins[m.index] = begin
            begin = -(-max(begin + m.length for m in region) // width) * width
    return begins


class _Alike:
    """Sets of maps whose numbers lie in one order, and what each set gains by being planar."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}
        self._gain: dict[int, float] = {}
        self._followed: dict[int, int] = {}

    def _root(self, index: int) -> int:
        while (parent := self._parent.get(index, index)) != index:
            index = parent
        return index

    def join(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        if a != b:
            self._parent[b] = a
            if b in self._gain:
                self.add(a, self._gain.pop(b))

    def follow(self, index: int, other: int) -> None:
        """Lie as another map does, if there is nothing to gain from either order."""
        self._followed[index] = other

    def add(self, index: int, gain: float) -> None:
        root = self._root(index)
        self._gain[root] = self._gain.get(root, 0.0) + gain

    def advantage(self, index: int) -> float:
        root, seen = self._root(index), set[int]()
        while root not in self._gain and root not in seen:
            seen.add(root)
            followed = (other for one, other in self._followed.items() if self._root(one) == root)
            root = self._root(next(followed, root))
        return self._gain.get(root, 0.0)


def _pooled_mask(fused: Fused) -> Bool:
    """Where a convolution's output is not its constant: [O, H, W]."""
    if fused.pool is None:
        return fused.mask
    (height, width), (kh, kw) = fused.size, fused.windows
    windows = fused.mask[:, : height * kh, : width * kw].reshape(-1, height, kh, width, kw)
    pooled: Bool = np.logical_or.reduce(windows, axis=(2, 4))
    return pooled


def _map_gather(
    value: MapValue,
    parts: list[Map],
    how: int,
    table: Int32,
    target: Map,
    pool: MapPoolStruct,
    weight: Float | None = None,
) -> Filled:
    """Pixel by pixel, what `table` says, -1 being nothing, with the `weight` of each: [pixels, taps].

    `how`: SUM or PRODUCT of the parts, or 0: they lie side by side.
    """
    inside = table >= 0
    places = np.where(inside, table, 0)[inside]
    children = [part.first + part.at(places if part.size == value.size else 0 * places) for part in parts]
    channels = np.array([part.channels for part in parts], dtype=np.int32)
    return Filled(MapGatherStruct()).with_values(
        pixels=len(table),
        out=target.at(np.arange(len(table))),
        parts=len(parts),
        channels=channels,
        step=np.array([part.channel for part in parts], dtype=np.int32),
        first=np.zeros_like(channels) if how else cumulative(channels)[:-1].copy(),
        out_channel=target.channel,
        child_start=cumulative(inside.sum(axis=1)),
        child=np.stack(children).astype(np.int32),
        children=int(inside.sum()),
        weight=None if weight is None else single(weight[inside]),
        scale=None if value.scale is None else _whole_vectors(value.scale),
        shift=None if value.shift is None else _whole_vectors(value.shift),
        combined=how,
        pool=pool,
    )


def _plane_resample(value: MapValue, lines: Axis, columns: Axis, target: Map, band: int) -> Filled:
    source, line, _ = value.planes()
    room = ((0, 0), (0, 64))  # whole vectors are read
    return Filled(PlaneResampleStruct()).with_values(
        channels=target.channels,
        band=band,
        source=source,
        line=line,
        scale=None if value.scale is None else single(value.scale),
        shift=None if value.shift is None else single(value.shift),
        function=struct_of(value.function),
        width=value.size[1],
        out_height=len(lines.first),
        out_width=len(columns.first),
        out_plane=target.channel,
        out_line=target.line,
        first_line=lines.first,
        line_weight=single(lines.weight),
        line_taps=lines.weight.shape[1],
        first_column=np.pad(columns.first, room[1]),
        column_weight=single(np.pad(columns.weight.T, room)),
        column_taps=columns.weight.shape[1],
        column_pitch=len(columns.first) + 64,
    )


def _map_norm(norm: ChannelNorm, source: Map, target: Map) -> Filled:
    return Filled(MapNormStruct()).with_values(
        channels=source.channels,
        width=source.size[1],
        channel=source.channel,
        line=source.line,
        pixel=source.pixel,
        out_channel=target.channel,
        out_line=target.line,
        out_pixel=target.pixel,
        scale=_whole_vectors(norm.scale.numpy()),
        shift=_whole_vectors(norm.shift.numpy()),
        eps=norm.eps,
    )


def _map_select(value: MapValue, target: Map, pool: MapPoolStruct) -> Filled:
    """Pixel by pixel, of any channels of the parts."""
    first, line, pixel = (np.pad(one, (0, 64)) for one in value.planes())  # whole vectors are read
    return Filled(MapSelectStruct()).with_values(
        width=target.size[1],
        out=target.at(np.arange(target.size[0] * target.size[1])),
        out_channel=target.channel,
        channels=target.channels,
        first=first,
        line=line,
        pixel=pixel,
        scale=None if value.scale is None else _whole_vectors(value.scale),
        shift=None if value.shift is None else _whole_vectors(value.shift),
        function=pool.function,
    )


def _plane_gather(
    value: MapValue, parts: list[Map], how: int, geometry: Geometry, target: Map, band: int, pool: MapPoolStruct
) -> Filled:
    """Channel by channel. `how`: as for `_map_gather`."""
    g = geometry
    planes, lines, _ = value.planes()
    if how:
        planes = np.stack([part.first + np.arange(part.channels) * part.channel for part in parts], axis=1)
        lines = np.stack([np.full(part.channels, part.line) for part in parts], axis=1)
    return Filled(PlaneGatherStruct()).with_values(
        channels=target.channels,
        operands=len(parts) if how else 1,
        combined=how,
        one_pixel=bool(how) and parts[-1].size != value.size,
        band=band,
        source=np.ascontiguousarray(planes, dtype=np.int32),
        line=np.ascontiguousarray(lines, dtype=np.int32),
        scale=None if value.scale is None else single(value.scale),
        shift=None if value.shift is None else single(value.shift),
        height=g.input_size[0],
        width=g.input_size[1],
        out_height=g.output_size[0],
        out_width=g.output_size[1],
        out_plane=target.channel,
        out_line=target.line,
        **window_fields(g),
        top=g.before[0],
        left=g.before[1],
        pool=pool,
    )


def _whole_vectors(values: Float) -> Float:
    """With room behind, which loads may touch."""
    return single(np.pad(values, (0, 64)))


def _dense(m: Map) -> Filled:
    return Filled(MapDenseStruct()).with_values(
        channels=m.channels, height=m.size[0], width=m.size[1], channel=m.channel, line=m.line, pixel=m.pixel
    )
