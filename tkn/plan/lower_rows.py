"""From a graph's operations to the engine's: rows, lists, and the memory that they share (batch-inner layout)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tkn.backends.cpu.kernels import contiguous, fill_conv, fill_gather
from tkn.backends.cpu.rows import Bool, Children, Float, Int32, Rows, cumulative, forward_taps, pooled_order, slices
from tkn.backends.cpu.structs import MAX, PRODUCT, SUM, Filled, Kind, PairingStruct, RowNormStruct
from tkn.geometry import Geometry, Pool
from tkn.plan.fuse import Following
from tkn.plan.graph import Affine, ChannelNorm, Convolve, Graph, Pooling, Same
from tkn.plan.lowering import Lowering, Pending, normalised
from tkn.plan.nonlinearity import Nonlinearity, struct_of
from tkn.plan.pairing import Pairing, pairing_of
from tkn.plan.resampling import Axis, windows

#: Above this size, bytes, what a convolution reads is made just before it is read.
_INTERLEAVED = 128 * 1024
#: Up to so many convolved pixels, their outputs are divided among threads, so many together.
_FEW_PIXELS, _SHARE = 8, 24


@dataclass
class Buffer:
    """Rows of a tile's memory, needed from instruction `first` to `last`."""

    rows: int
    first: int
    last: int
    offset: int = 0


@dataclass(frozen=True, eq=False)
class RowValue(Pending):
    """An activation whose x is in rows of memory.

    `rows`: the row of each (channel, pixel), -1 where there is none: [C, H * W]. `whole`: the Rows, if they are all of
    one buffer.
    """

    size: tuple[int, ...]
    rows: Int32
    buffers: tuple[Buffer, ...]
    whole: Rows | None = None

    @property
    def mask(self) -> Bool:
        return (self.rows >= 0).reshape(len(self.rows), *self.size)


@dataclass
class RowInstruction:
    """One instruction: its structure, its first rows, and the parts of it that steps may run."""

    kind: Kind
    spec: Filled
    source: Buffer | None
    output: Buffer | None
    parts: int
    #: what a gather reads
    reads: tuple[Buffer, ...] = ()
    dense: int = 0
    #: of a convolution that may run part by part: how many pixels of its source must be made before each part
    pixels_before: Int32 | None = None
    #: of such a convolution: which instruction makes its source
    made_by: int | None = None
    #: how much there is before each part, and in all; None if each is as much
    work: Int32 | None = None


class RowLowering(Lowering[RowValue]):
    """For large batches. `pairs`: convolutions multiply pairs of bfloat16 where that is faster."""

    def __init__(
        self,
        graph: Graph,
        nodes: list[int],
        inputs: list[int],
        outputs: list[int],
        lanes: int,
        dtype: torch.dtype,
        *,
        pairs: bool = False,
    ) -> None:
        super().__init__(graph, nodes, inputs, outputs)
        self.lanes, self.dtype, self._pairs = lanes, dtype, pairs
        self.real = torch.empty((), dtype=dtype, device="cpu").numpy().dtype
        self.buffers: list[Buffer] = []
        self.instructions: list[RowInstruction] = []
        offsets: list[int] = []
        # Twice: the lists hold places in memory, which are known once all lifetimes are.
        for _ in range(2):
            self.placed = offsets
            self.buffers, self.instructions = [], []
            self._walk()
            offsets = self._place()
            if self.memory_rows >= 2**31:
                raise ValueError(f"{self.memory_rows} rows are too many for lists of 32 bits")

    @property
    def memory_rows(self) -> int:
        return max((buffer.offset + buffer.rows for buffer in self.buffers), default=0)

    def steps(self) -> list[tuple[int, int, int]]:
        """(instruction, begin, end): in order, but what a convolution alone reads is made shortly before."""
        made_late = {conv.made_by for conv in self.instructions if conv.made_by is not None}
        steps = []
        for position, instruction in enumerate(self.instructions):
            if position in made_late:
                continue
            source = instruction.made_by
            if source is None or instruction.pixels_before is None:
                steps.append((position, 0, instruction.parts))
                continue
            blocks = slices(instruction.parts, len(instruction.pixels_before))
            made = 0
            for (begin, end), pixels in zip(blocks, instruction.pixels_before.tolist(), strict=True):
                if pixels > made:
                    steps.append((source, made, pixels))
                    made = pixels
                steps.append((position, begin, end))
            if made < self.instructions[source].parts:  # read by others
                steps.append((source, made, self.instructions[source].parts))
        return steps

    def _buffer(self, rows: Rows) -> Buffer:
        index = len(self.buffers)
        here = len(self.instructions)
        buffer = Buffer(rows.count, here, here, self.placed[index] if self.placed else 0)
        self.buffers.append(buffer)
        return buffer

    def _place(self) -> list[int]:
        """First fit: buffers that live at the same time do not overlap."""
        placed: list[Buffer] = []
        for buffer in sorted(self.buffers, key=lambda b: -b.rows):
            offset = 0
            for other in sorted(placed, key=lambda b: b.offset):
                alive = other.first <= buffer.last and buffer.first <= other.last
                if alive and offset + buffer.rows > other.offset and offset < other.offset + other.rows:
                    offset = other.offset + other.rows
            buffer.offset = offset
            placed.append(buffer)
        return [buffer.offset for buffer in self.buffers]

    def _use(self, value: RowValue) -> None:
        for buffer in value.buffers:
            buffer.last = len(self.instructions)

    def _whole(self, rows: Rows, outside: Float) -> tuple[RowValue, Buffer]:
        buffer = self._buffer(rows)
        places = np.where(rows.dense >= 0, rows.dense + np.int32(buffer.offset), -1).astype(np.int32)
        return RowValue(rows.size, places, (buffer,), rows, outside=outside), buffer

    def _pack(self, position: int) -> None:
        size = self.graph.nodes[position].size
        assert size is not None
        rows = Rows.full(size[0], size[1:])
        value, buffer = self._whole(rows, np.zeros(size[0]))
        self.instructions.append(
            RowInstruction(
                Kind.PACK, contiguous(rows), None, buffer, size[0] * size[1], dense=self.inputs.index(position)
            )
        )
        self.values[position] = value

    def _unpack(self, position: int, dense: int) -> None:
        value = self._materialised(self.values[position])
        assert value.whole is not None
        self._use(value)
        rows = value.whole
        spec = contiguous(rows, np.ascontiguousarray(value.constants(), dtype=self.real))
        parts = rows.channels * rows.size[0]
        self.instructions.append(RowInstruction(Kind.UNPACK, spec, value.buffers[0], None, parts, dense=dense))

    def _concatenated(self, parts: list[RowValue]) -> RowValue:
        return RowValue(
            parts[0].size,
            np.concatenate([part.rows for part in parts]),
            tuple(buffer for part in parts for buffer in part.buffers),
            outside=np.concatenate([part.outside for part in parts]),
        )

    def _resampled(self, value: RowValue, lines: Axis, columns: Axis, *, maximum: bool) -> RowValue:
        value = self._materialised(value) if value.function else value
        table, weight = windows(lines, columns, value.size[1])
        live = value.mask.reshape(len(value.rows), -1)[:, table] & (table >= 0)
        constants = value.constants()
        mask: Bool = np.logical_or.reduce(live, axis=2)
        if not maximum:  # of other weights a constant becomes another one
            mask |= (constants != 0)[:, None] & ~np.isclose(weight.sum(axis=1), 1, rtol=0, atol=1e-9)
        output = Rows.of(mask.reshape(len(mask), len(lines.first), len(columns.first)))
        channel, pixel = output.channel, output.entry_position
        there = live[channel, pixel]
        entry, tap = np.nonzero(there)
        of, at = channel[entry], pixel[entry]
        scale = None if value.scale is None else value.scale[of]
        shift = None if value.shift is None else value.shift[of]
        if maximum:
            missing = ((table >= 0)[pixel] & ~there).any(axis=1)
            init = np.where(missing, constants[channel], -np.inf)
        else:
            init = (weight[pixel] * ~there).sum(axis=1) * constants[channel]
            scale = weight[at, tap] if scale is None else weight[at, tap] * scale
            shift = None if shift is None else weight[at, tap] * shift
        children = Children(output, output, cumulative(there.sum(axis=1)), entry, np.zeros_like(channel))
        result, buffer = self._whole(output, constants)
        spec = fill_gather(
            children,
            child_row=np.ascontiguousarray(value.rows[of, table[at, tap]], dtype=np.int32),
            pooling=MAX if maximum else SUM,
            scale=self._array(scale),
            shift=self._array(shift),
            init=self._array(init),
        )
        self._use(value)
        self.instructions.append(
            RowInstruction(Kind.GATHER, spec, None, buffer, len(output.order), reads=value.buffers)
        )
        return result

    def _normalised(self, value: RowValue, norm: ChannelNorm) -> RowValue:
        channels = len(value.rows)
        pixels = (value.rows >= 0).any(axis=0)
        mask = np.broadcast_to(pixels, value.rows.shape).reshape(value.mask.shape)
        result, buffer = self._whole(Rows.of(mask), normalised(norm, value.outside))
        here = np.nonzero(pixels)[0]
        rows = np.ascontiguousarray(value.rows[:, here].T)
        known = rows < 0
        count = known.sum(axis=1)
        mean = (known * value.outside).sum(axis=1) / np.maximum(count, 1)
        square = (known * (value.outside - mean[:, None]) ** 2).sum(axis=1)
        whole = result.whole
        assert whole is not None
        spec = Filled(RowNormStruct()).with_values(
            channels=channels,
            row=rows,
            out_base=np.ascontiguousarray(whole.base[here]),
            known=self._array(count),
            known_mean=self._array(mean),
            known_square=self._array(square),
            outside=self._array(value.outside),
            scale=self._array(norm.scale.cpu().numpy()),
            shift=self._array(norm.shift.cpu().numpy()),
            eps=norm.eps,
        )
        self._use(value)
        self.instructions.append(RowInstruction(Kind.ROW_NORM, spec, None, buffer, len(here), reads=value.buffers))
        return result

    def _selected(self, value: RowValue, channels: Int32) -> RowValue:
        return replace(value.of_channels(channels), rows=np.ascontiguousarray(value.rows[channels]), whole=None)

    def _materialised(self, value: RowValue) -> RowValue:
        return value if value.whole is not None and not value.pending else self._gather([value], None)

    def _gather(self, sources: list[RowValue], pooling: Pooling | None) -> RowValue:
        if len(sources) > 1:
            sources = [self._materialised(source) if source.function else source for source in sources]
        children, rows, scale, shift = self._children(sources, pooling)
        constants = np.stack([source.constants() for source in sources])
        channel = children.output.channel
        maximum = pooling is not None and not pooling.average
        factor = 1.0
        if maximum:
            init = np.where(children.missing > 0, constants[0][channel], -np.inf)
        elif pooling is not None:
            factor = 1 / pooling.geometry.taps
            init = children.missing * constants[0][channel] * factor
        else:
            init = np.zeros(len(channel))
            for source, constant in zip(sources, constants, strict=True):
                missing = ~source.mask.reshape(len(source.rows), -1).T[children.output.entry_position, channel]
                init += missing * constant[channel]
        function = sources[0].function
        outside = constants.sum(axis=0)
        value, buffer = self._whole(children.output, outside)
        spec = fill_gather(
            children,
            child_row=rows,
            pooling=MAX if maximum else SUM,
            factor=factor,
            function=struct_of(function),
            scale=self._array(scale),
            shift=self._array(shift),
            init=self._array(init),
        )
        for source in sources:
            self._use(source)
        reads = tuple(b for source in sources for b in source.buffers)
        self.instructions.append(RowInstruction(Kind.GATHER, spec, None, buffer, len(children.output.order), reads))
        return value

    def _product(self, value: RowValue, factor: RowValue) -> RowValue:
        output = Rows.of(value.mask | (value.outside != 0)[:, None, None])
        channel, pixel = output.channel, output.entry_position
        init: Float = np.ones(len(channel))
        places: list[Int32] = []
        for source in (value, factor):
            place = source.rows[channel, pixel if source.size == value.size else 0]
            init *= np.where(place < 0, source.outside[channel], 1)
            places.append(place)
        rows = np.stack(places, axis=1)
        there = rows >= 0
        start = cumulative(there.sum(axis=1))
        missing = np.zeros(len(channel), dtype=np.int32)
        children = Children(output, output, start, np.nonzero(there)[0].astype(np.int32), missing)
        made, buffer = self._whole(output, np.zeros(len(value.outside)))
        spec = fill_gather(
            children,
            child_row=np.ascontiguousarray(rows[there], dtype=np.int32),
            pooling=PRODUCT,
            factor=1.0,
            init=self._array(init),
        )
        for source in (value, factor):
            self._use(source)
        reads = (*value.buffers, *factor.buffers)
        self.instructions.append(RowInstruction(Kind.GATHER, spec, None, buffer, len(output.order), reads))
        return made

    def _children(
        self, sources: list[RowValue], pooling: Pooling | None
    ) -> tuple[Children, Int32, Float | None, Float | None]:
        """Which rows of memory the output's entries combine, and each one's scale and shift."""
        if len(sources) > 1:
            masks = np.stack([source.mask for source in sources])
            output = Rows.of(np.logical_or.reduce(masks))
            live = masks.reshape(len(sources), len(sources[0].rows), -1)[:, output.channel, output.entry_position].T
            count = live.sum(axis=1)
            which = np.nonzero(live)
            entry, source_of = which
            places = np.stack([source.rows for source in sources])
            rows = places[source_of, output.channel[entry], output.entry_position[entry]]
            start = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
            scales = [np.ones(len(s.rows)) if s.scale is None else s.scale for s in sources]
            shifts = [np.zeros(len(s.rows)) if s.shift is None else s.shift for s in sources]
            scale = np.stack(scales)[source_of, output.channel[entry]]
            shift = np.stack(shifts)[source_of, output.channel[entry]]
            children = Children(output, output, start, entry.astype(np.int32), np.zeros(output.live, dtype=np.int32))
            return children, np.ascontiguousarray(rows, dtype=np.int32), scale, shift
        (value,) = sources
        source = Rows.of(value.mask)
        if pooling is None:
            children = Children.same(source)
        else:
            children = Children.windows(source, pooling.geometry, value.constants() != 0)
        channel = source.channel[children.entry]
        rows = value.rows[channel, source.entry_position[children.entry]]
        if value.scale is None:
            return children, np.ascontiguousarray(rows), None, None
        assert value.shift is not None
        return children, np.ascontiguousarray(rows), value.scale[channel], value.shift[channel]

    def _convolution(self, position: int, conv: Convolve, value: RowValue) -> None:
        following = Following(self.graph, position, self.own, set(self.outputs))
        pooling = following.average_before(conv)
        if pooling is not None:
            value = self._gather([value], pooling)
            conv = replace(conv, geometry=replace(conv.geometry, input_size=value.size))
        fused = following.fuse(conv, value.mask, value.constants())
        pairing = pairing_of(conv, value.mask) if self._pairs else None
        if pairing is None:
            source = self._materialised(value)
            geometry, weight = conv.geometry, conv.weight.to(self.dtype)
        else:
            source = self._paired(position, value, pairing)
            geometry, weight = pairing.geometry, pairing.weight
        assert source.whole is not None
        pool = fused.pool
        convolved = Rows.of(fused.mask, pooled_order(pool, geometry.output_size))
        pixel = convolved.order[convolved.entry_position]
        at = (convolved.channel, *np.divmod(pixel, geometry.output_size[1]))
        self._use(source)
        spec = fill_conv(source.whole, convolved, geometry, conv.groups, self.lanes, self.dtype).with_values(
            weight=weight.permute(0, 2, 3, 1).contiguous(),
            scale=self._array(fused.scale[at]),
            shift=self._array(fused.shift[at]),
            function=struct_of(fused.function),
        )
        if pool is None:
            result, buffer = self._whole(convolved, fused.outside)
            if len(convolved.order) <= _FEW_PIXELS:
                spec = _divided(spec)
            parts = spec.struct.pixels
        else:
            children = Children.pooled(convolved, pool)
            result, buffer = self._whole(children.output, fused.outside)
            spec = self._pooled(spec, children, pool, fused.outside)
            parts = len(children.output.order)
        kind = Kind.CONV if pairing is None else Kind.CONV_PAIRS
        instruction = RowInstruction(kind, spec, source.buffers[0], buffer, parts, work=_work(spec))
        if len(convolved.order) > _FEW_PIXELS:
            self._interleave(instruction, convolved, geometry)
        self.instructions.append(instruction)
        for done in fused.nodes:
            self.values[done] = result

    def _paired(self, position: int, value: RowValue, pairing: Pairing) -> RowValue:
        """Rows of pairs of bfloat16, nothing pending, for the convolution at `position`."""
        places = pairing.of(value.rows.reshape(-1, *value.size), -1)
        mask: Bool = np.logical_or.reduce(places >= 0, axis=3)
        output = Rows.of(mask)
        made, buffer = self._whole(output, np.zeros(len(places)))
        rows = places[output.channel, *np.divmod(output.entry_position, places.shape[2])]
        members = pairing.members[output.channel]
        spec = Filled(PairingStruct()).with_values(
            pixels=len(output.order),
            out_start=output.start,
            out_base=np.ascontiguousarray(output.base),
            row=np.ascontiguousarray(rows, dtype=np.int32),
            scale=None if value.scale is None else self._array(value.scale[members]),
            shift=None if value.shift is None else self._array(value.shift[members]),
            function=struct_of(value.function),
        )
        if not pairing.beside and self._written_for(position, value):
            # As the convolution before writes: its own rows are in memory for a pixel only.
            assert value.whole is not None
            before, (unpaired,) = self.instructions[-1], value.buffers
            first = unpaired.offset + value.whole.base[output.entry_position][:, None]
            spec = spec.with_values(row=np.where(rows < 0, -1, rows - first).astype(np.int32))
            before.spec = before.spec.with_values(pairing=ctypes.addressof(spec.struct), pairing_arrays=spec)
            before.output, unpaired.rows, buffer.first = buffer, 0, buffer.first - 1
            return made
        self._use(value)
        self.instructions.append(RowInstruction(Kind.PAIR, spec, None, buffer, len(output.order), reads=value.buffers))
        return made

    def _written_for(self, position: int, value: RowValue) -> bool:
        """Whether the instruction just before is a convolution that makes a value for that at `position` alone."""
        before, whole = self.instructions[-1], value.whole
        if before.kind not in (Kind.CONV, Kind.CONV_PAIRS) or whole is None or value.buffers != (before.output,):
            return False
        if before.parts != len(whole.order):  # its pixels are divided
            return False
        nodes = self.graph.nodes
        while True:
            position = nodes[position].inputs[0]
            if position in self.outputs or len(nodes[position].users) > 1:
                return False
            if not isinstance(nodes[position].operation, Affine | Nonlinearity | Same):
                return True

    def _pooled(self, spec: Filled, children: Children, pool: Pool, outside: Float) -> Filled:
        """The convolution with pooling: children are rows counted from the first of their window."""
        windows = children.window_starts()
        convolved = children.source
        first = convolved.start[windows]
        counts = np.diff(children.start)
        window_of = np.repeat(children.output.entry_position, counts)
        channel = children.output.channel
        if pool.average:
            factor = 1 / (pool.kernel[0] * pool.kernel[1])
            init = children.missing * outside[channel] * factor
        else:
            factor, init = 1.0, np.where(children.missing > 0, outside[channel], -np.inf)
        gather = fill_gather(
            children,
            child_row=np.ascontiguousarray(children.entry - first[window_of], dtype=np.int32),
            pooling=SUM if pool.average else MAX,
            factor=factor,
            init=self._array(init),
        )
        return spec.with_values(windows=len(windows) - 1, window_start=windows, pool=gather.struct, pool_arrays=gather)

    def _interleave(self, conv: RowInstruction, convolved: Rows, geometry: Geometry) -> None:
        """Let the gather just before run part by part with the convolution, if its rows would not stay in a cache."""
        position = len(self.instructions) - 1
        gather = self.instructions[position]
        if gather.kind not in (Kind.GATHER, Kind.PAIR) or gather.output is None or gather.output is not conv.source:
            return
        if gather.output.rows * self.lanes * self.dtype.itemsize < _INTERLEAVED:
            return
        start, pixel, _ = forward_taps(geometry, convolved.order)
        per_part = len(convolved.order) // conv.parts
        blocks = max(1, round(conv.parts**0.5))  # about one line of the map
        before = [int(pixel[: start[end * per_part]].max(initial=-1)) + 1 for _, end in slices(conv.parts, blocks)]
        conv.pixels_before, conv.made_by = np.array(before, dtype=np.int32), position
        for buffer in gather.reads:
            buffer.last = position + 1

    def _array(self, values: Float | None) -> NDArray[Any] | None:
        return None if values is None else np.ascontiguousarray(values, dtype=self.real)


def _divided(spec: Filled) -> Filled:
    """A convolution of few pixels, each cut into several of fewer outputs, for threads to share."""
    kept = spec.kept
    start, taps = kept["dst_start"], np.diff(kept["tap_start"])
    begins, bases, which, counts = [], [], [], []
    for pixel, (first, last) in enumerate(pairwise(start.tolist())):
        entries = np.arange(first, max(last, first + 1), _SHARE)
        begins.append(entries)
        bases.append(kept["dst_base"][pixel] + entries - first)
        which.append(np.tile(np.arange(*kept["tap_start"][pixel : pixel + 2]), len(entries)))
        counts.append(np.full(len(entries), taps[pixel]))
    chosen = np.concatenate(which)
    dst_start = np.append(np.concatenate(begins), start[-1]).astype(np.int32)
    return spec.with_values(
        pixels=len(dst_start) - 1,
        dst_start=dst_start,
        dst_base=np.concatenate(bases).astype(np.int32),
        tap_start=cumulative(np.concatenate(counts)),
        tap_pixel=np.ascontiguousarray(kept["tap_pixel"][chosen]),
        tap_index=np.ascontiguousarray(kept["tap_index"][chosen]),
    )


def _work(spec: Filled) -> Int32:
    """Multiplications before each part of a convolution, and in all."""
    kept = spec.kept
    starts = kept["src_start"]
    live = (starts[:, -1] - starts[:, 0])[kept["tap_pixel"]]
    before = np.concatenate([[0], np.cumsum(live)])[kept["tap_start"]]
    each = (np.diff(before) + 1) * np.diff(kept["dst_start"])
    total = np.concatenate([[0], np.cumsum(each)]).astype(np.int64)
    return np.ascontiguousarray(total[kept["window_start"]]) if spec.struct.windows else total
