"""Lowers a graph to the GPU's rows: all activations in one memory, each number that may vary in a row of its own.

What is constant outside of the ROIs (behind a batch normalisation it need not be zero) is added where a convolution
reaches it, once, when the plan is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tkn.backends.cpu.rows import Bool, Float, Int32
from tkn.backends.cuda.combine import combine
from tkn.backends.cuda.device import tf32_allowed
from tkn.backends.cuda.lists import Lists
from tkn.backends.cuda.packing import from_rows, padded, to_rows
from tkn.backends.cuda.product import Epilogue, multiply, pack
from tkn.backends.cuda.rows import Rows, full_rows
from tkn.geometry import Geometry, Pool
from tkn.plan.fuse import Following
from tkn.plan.graph import Convolve, Graph, Pooling
from tkn.plan.lowering import Lowering, Pending


@dataclass(frozen=True, eq=False, kw_only=True)
class GpuValue(Pending):
    """An activation in memory. `place`: the row of each number, int64 [C, H, W], 0 where there is none."""

    place: NDArray[np.int64]

    @property
    def mask(self) -> Bool:
        """Where it has rows: bool [C, H, W]."""
        return self.place > 0


@dataclass(frozen=True, eq=False)
class Memory:
    """What one run of a plan computes in: all rows [rows, images], of which the first is zero; what comes from outside
    and goes there [images, C, H, W]."""

    rows: Tensor
    inputs: list[Tensor]
    outputs: list[Tensor]


#: A kernel or two that read and write the memory.
Step = Callable[[Memory], None]


class GpuLowering(Lowering[GpuValue]):
    """Of batches of `images` in `dtype` on `device`. `steps`: what computes the part; `rows`: of its memory."""

    def __init__(
        self,
        graph: Graph,
        nodes: list[int],
        inputs: list[int],
        outputs: list[int],
        images: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(graph, nodes, inputs, outputs)
        self.images, self.device, self.dtype = images, device, dtype
        self.steps: list[Step] = []
        self.rows = 1
        self._walk()

    def memory(self) -> Tensor:
        """Of one run."""
        return torch.zeros(self.rows, padded(self.images), dtype=self.dtype, device=self.device)

    def _allocated(self, rows: Rows, outside: Float) -> tuple[slice, GpuValue]:
        """Place for rows, and the activation that will be there."""
        where = slice(self.rows, self.rows + rows.capacity + 1)
        self.rows = where.stop
        row = rows.row.cpu().numpy().reshape(rows.channels, *rows.size).astype(np.int64)
        return where, GpuValue(outside=outside, place=np.where(row < rows.capacity, where.start + row, 0))

    def _pack(self, position: int) -> None:
        size = self.graph.nodes[position].size
        assert size is not None
        channels, height, width = size
        rows = full_rows(channels, (height, width), self.device)
        where, self.values[position] = self._allocated(rows, np.zeros(channels))
        index = self.inputs.index(position)

        def step(memory: Memory) -> None:
            to_rows(memory.inputs[index], rows, self.dtype, memory.rows[where])

        self.steps.append(step)

    def _unpack(self, position: int, dense: int) -> None:
        value = self._materialised(self.values[position])
        channels, height, width = value.place.shape
        rows = full_rows(channels, (height, width), self.device)
        row = self._integers(value.place).flatten()
        constants = torch.from_numpy(np.where(value.mask, 0.0, value.outside[:, None, None]))
        missing = constants.to(self.device, self.dtype) if constants.any() else None
        index = dense - len(self.inputs)

        def step(memory: Memory) -> None:
            out = memory.outputs[index]
            out.copy_(from_rows(memory.rows, rows, len(out), self.dtype, channels_last=False, row=row))
            if missing is not None:
                out.add_(missing)

        self.steps.append(step)

    def _materialised(self, value: GpuValue) -> GpuValue:
        return self._gather([value], None) if value.pending else value

    def _concatenated(self, parts: list[GpuValue]) -> GpuValue:
        outside = np.concatenate([part.outside for part in parts])
        return GpuValue(outside=outside, place=np.concatenate([part.place for part in parts]))

    def _selected(self, value: GpuValue, channels: Int32) -> GpuValue:
        return replace(value.of_channels(channels), place=value.place[channels])

    def _product(self, value: GpuValue, factor: GpuValue) -> GpuValue:  # noqa: ARG002
        raise AssertionError("products are torch's on a GPU")

    def _gather(self, sources: list[GpuValue], pooling: Pooling | None) -> GpuValue:
        if len(sources) > 1:
            sources = [self._materialised(source) if source.function else source for source in sources]
        maximum = pooling is not None and not pooling.average
        _, height, width = sources[0].place.shape
        geometry = Geometry((height, width), (1, 1)) if pooling is None else pooling.geometry
        factor = 1.0 if pooling is None or maximum else 1 / geometry.taps
        children = [_children(source, geometry, factor, maximum=maximum) for source in sources]
        constants = np.stack([source.constants() for source in sources]).sum(axis=0)
        return self._combined(children, constants, relu=sources[0].function is not None, maximum=maximum)

    def _combined(self, children: list[_Children], outside: Float, *, relu: bool, maximum: bool) -> GpuValue:
        """The sum or maximum of what is in `children`, in rows of its own."""
        mask = np.logical_or.reduce([one.varies for one in children])
        rows = Rows.of(torch.from_numpy(mask).to(self.device))
        where, value = self._allocated(rows, outside)
        at = _coordinates(rows)
        # Rows beyond those that are used compute what nobody reads, and the last one is zero.
        columns = [
            np.concatenate([getattr(one, name)[at] for one in children], axis=1) for name in ("row", "scale", "shift")
        ]
        row, scale, shift = (np.concatenate([column, np.zeros_like(column[:1])]) for column in columns)
        child, a, b = self._integers(row), self._numbers(scale), self._numbers(shift)

        def step(memory: Memory) -> None:
            combine(memory.rows, memory.rows[where], child, a, b, relu=relu, maximum=maximum)

        self.steps.append(step)
        return value

    def _convolution(self, position: int, conv: Convolve, value: GpuValue) -> None:
        following = Following(self.graph, position, self.own, set(self.outputs))
        average = following.average_before(conv)
        if average is not None:
            value = self._gather([value], average)
            height, width = value.place.shape[1:]
            conv = replace(conv, geometry=replace(conv.geometry, input_size=(height, width)))
        source = self._materialised(value)
        fused = following.fuse(conv, source.mask, source.constants())
        inputs = Rows.of(torch.from_numpy(source.mask).to(self.device))
        outputs = Rows.of(torch.from_numpy(_read(fused.mask, fused.pool)).to(self.device))
        lists = Lists.of(inputs, outputs, conv.geometry)
        packed = pack(conv.weight.to(self.device), lists, conv.groups, self.dtype)
        in_memory = self._integers(np.append(source.place.flatten(), 0))
        rows = torch.nn.functional.pad(in_memory[inputs.places()], (0, 1))[lists.rows.long()]
        at = _coordinates(outputs)
        epilogue = Epilogue(self._numbers(fused.scale[at]), self._numbers(fused.shift[at]), fused.function is not None)
        where, convolved = self._allocated(outputs, fused.outside)

        def step(memory: Memory) -> None:
            multiply(memory.rows, packed, lists, epilogue, tf32=tf32_allowed(), rows=rows, out=memory.rows[where])

        self.steps.append(step)
        result = convolved if fused.pool is None else self._pooled(convolved, fused.pool)
        for done in fused.nodes:
            self.values[done] = result

    def _pooled(self, convolved: GpuValue, pool: Pool) -> GpuValue:
        height, width = convolved.place.shape[1:]
        geometry = Geometry((height, width), pool.kernel, pool.kernel)
        return self._gather([convolved], Pooling(geometry, pool.average))

    def _integers(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self.device)

    def _numbers(self, values: Float) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self.device)


def _coordinates(rows: Rows) -> tuple[NDArray[np.int32], ...]:
    """Channel, y and x of each row."""
    return rows.channel.cpu().numpy(), *np.divmod(rows.pixel.cpu().numpy(), rows.size[1])


@dataclass(frozen=True, eq=False)
class _Children:
    """What each number of a result is made of, [C, H, W, n]: a row, its scale and shift; where it varies, [C, H, W]."""

    row: NDArray[np.int64]
    scale: Float
    shift: Float
    varies: Bool


def _children(value: GpuValue, geometry: Geometry, factor: float, *, maximum: bool) -> _Children:
    """The numbers in each window of `geometry`, times `factor`. What is padded is left out of a maximum, else zero."""
    channels, height, width = value.place.shape
    scale = np.ones(channels) if value.scale is None else value.scale
    shift = np.zeros(channels) if value.shift is None else value.shift
    constants = value.constants()
    ys, xs = (_taps(geometry, axis) for axis in (0, 1))
    inside = ((ys >= 0) & (ys < height))[:, None, :, None] & ((xs >= 0) & (xs < width))[None, :, None, :]
    y, x = np.clip(ys, 0, height - 1)[:, None, :, None], np.clip(xs, 0, width - 1)[None, :, None, :]
    row = np.where(inside, value.place[:, y, x], 0)
    live = row > 0
    wide = (slice(None), *(None,) * 4)
    known = np.where(inside, constants[wide], -np.inf if maximum else 0.0)
    a = np.where(live, factor * scale[wide], 0.0)
    b = np.where(live, factor * shift[wide], factor * known if not maximum else known)
    varies: Bool = np.asarray(live.any(axis=(3, 4)))
    if not maximum:  # near the border a mean of constants is another one
        varies |= (constants != 0)[:, None, None] & ~inside.all(axis=(2, 3))[None]
    shape = (channels, len(ys), len(xs), -1)
    return _Children(row.reshape(shape), a.reshape(shape), b.reshape(shape), varies)


def _taps(geometry: Geometry, axis: int) -> NDArray[np.int64]:
    """The coordinates that each window reads along an axis: [outputs, kernel]."""
    first = np.arange(geometry.output_size[axis]) * geometry.stride[axis] - geometry.before[axis]
    return first[:, None] + np.arange(geometry.kernel[axis]) * geometry.dilation[axis]


def _read(mask: Bool, pool: Pool | None) -> Bool:
    """The numbers of a convolution that a pooling reads."""
    if pool is None:
        return mask
    rows, columns = pool.output_size((mask.shape[1], mask.shape[2]))
    read = np.zeros_like(mask)
    read[:, : rows * pool.kernel[0], : columns * pool.kernel[1]] = True
    return mask & read
