"""Convolutions of planar maps: vectors along the rows of rectangles, in tasks of outputs that share one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tkn.backends.cpu.rows import Bool, Float, Int32
from tkn.backends.cpu.structs import Filled, PlaneConvStruct
from tkn.geometry import Geometry
from tkn.plan.fuse import Fused, is_pointwise, pool_struct, single
from tkn.plan.graph import Convolve
from tkn.plan.maps import Map

#: The rows of a task, or the vectors where rows follow each other.
_TASK_ROWS, _TASK_VECTORS = 8, 12
#: What a multiplication costs, of vectors, where a line that is loaded serves one line of the kernel only; where the
#: pixels that are read are not neighbours; and what a task's vectors take besides.
_UNSHARED, _STRIDED, _WRITING = 1.3, 3.0, 6.0


class _Rectangle(NamedTuple):
    row: int
    column: int
    rows: int
    columns: int


class _Task(NamedTuple):
    outputs: range
    at: _Rectangle


def plane_conv(fused: Fused, source: Map, target: Map, live: Bool, width: int) -> tuple[Filled, Float]:
    """And the work of each task. `live`: [C, H, W], where the source may not be zero; `width`: numbers of a vector."""
    conv = fused.conv
    g = conv.geometry
    pool = fused.windows
    rectangles = _rectangles(fused.mask, pool)
    full = all(r is None or (r.column, r.columns) == (0, g.output_size[1]) for r in rectangles)
    flat = is_pointwise(conv) and pool == (1, 1) and full and source.line == source.size[1]
    rows = _TASK_VECTORS * width // g.output_size[1] if flat else _TASK_ROWS
    tasks = list(_tasks(conv, rectangles, max(1, rows // pool[0]) * pool[0]))
    inputs = _Inputs(conv, live)
    values = _Values(fused, width, flat)
    table, work = [], []
    for task in tasks:
        first, count = inputs.of(task)
        start, uniform = values.of(task)
        r = task.at
        outputs = task.outputs[0], len(task.outputs)
        table.append((*outputs, r.row, r.column, r.rows, r.columns, first, count, uniform, start))
        work.append(len(task.outputs) * r.rows * -(-r.columns // width) * (count * g.taps + _WRITING))
    spec = Filled(PlaneConvStruct()).with_values(
        tasks=len(tasks),
        task=np.array(table, dtype=_TASK),
        input=inputs.joined(),
        scale=single(np.concatenate(values.scale)),
        shift=single(np.concatenate(values.shift)),
        **window_fields(g),
        outputs_per_group=len(conv.weight) // conv.groups,
        inputs_per_group=conv.weight.shape[1],
        plane=source.channel,
        line=source.line,
        out_channel=target.channel,
        out_line=target.line,
        out_pixel=target.pixel,
        flat=flat,
        pool_height=pool[0],
        pool_width=pool[1],
        weight=conv.weight.contiguous(),
        pool=pool_struct(fused),
    )
    return spec, np.array(work)


#: `PlaneTask` of planes.h.
_TASK = np.dtype(
    [
        *((name, np.int32) for name in ("output", "outputs", "row", "column", "rows", "columns")),
        *((name, np.int32) for name in ("first_input", "inputs", "uniform")),
        ("value_start", np.int64),
    ],
    align=True,
)


def window_fields(g: Geometry) -> dict[str, int]:
    """Of windows of planes, for the structures of planes.h."""
    return {
        f"{name}_{axis}": value
        for name, values in (("kernel", g.kernel), ("stride", g.stride), ("dilation", g.dilation))
        for axis, value in zip(("height", "width"), values, strict=True)
    }


def plane_cost(fused: Fused, width: int) -> float:
    """About how many multiplications of vectors take as long."""
    conv, g = fused.conv, fused.conv.geometry
    each = float(conv.weight.shape[1] * g.taps)
    if g.stride[1] > 1:
        each *= _STRIDED
    elif not _shares_lines(g):
        each *= _UNSHARED
    return sum((each + _WRITING) * r.rows * -(-r.columns // width) for r in _rectangles(fused.mask, fused.windows) if r)


def _shares_lines(g: Geometry) -> bool:
    return g.stride == g.dilation == (1, 1) and g.kernel[0] in (3, 5)


def _rectangles(mask: Bool, pool: tuple[int, ...]) -> list[_Rectangle | None]:
    """What is computed of each output, in whole windows of the pooling; None: nothing."""
    height, width = (side // k * k for side, k in zip(mask.shape[1:], pool, strict=True))
    inside = mask[:, :height, :width]
    lines: Bool = np.logical_or.reduce(inside, axis=2)
    columns: Bool = np.logical_or.reduce(inside, axis=1)
    top, left = (axis.argmax(axis=1) // k * k for axis, k in zip((lines, columns), pool, strict=True))
    ends = (axis.shape[1] - axis[:, ::-1].argmax(axis=1) for axis in (lines, columns))
    bottom, right = (-(-end // k) * k for end, k in zip(ends, pool, strict=True))
    return [
        _Rectangle(int(top[o]), int(left[o]), int(bottom[o] - top[o]), int(right[o] - left[o])) if some else None
        for o, some in enumerate(np.logical_or.reduce(lines, axis=1))
    ]


def _tasks(conv: Convolve, rectangles: list[_Rectangle | None], most_rows: int) -> Iterator[_Task]:
    """In an order in which neighbours read the same lines."""
    sizes = (2, 1) if _shares_lines(conv.geometry) else (4, 2, 1)
    per_group = len(conv.weight) // conv.groups
    bands: dict[int, list[_Task]] = {}
    output = 0
    while output < len(rectangles):
        whole = rectangles[output]
        alike = 1
        while (output + alike) % per_group and rectangles[output + alike] == whole:
            alike += 1
        count = next(size for size in sizes if size <= alike)
        if whole is not None:
            for row in range(0, whole.rows, most_rows):
                rows = min(most_rows, whole.rows - row)
                at = _Rectangle(whole.row + row, whole.column, rows, whole.columns)
                bands.setdefault(at.row // most_rows, []).append(_Task(range(output, output + count), at))
        output += count
    for _, tasks in sorted(bands.items()):
        yield from tasks


class _Inputs:
    """Which inputs of its kernels are not zero wherever a task reads them."""

    def __init__(self, conv: Convolve, live: Bool) -> None:
        self._conv, self._all = conv, bool(live.all())
        self._per_group = len(conv.weight) // conv.groups
        counts = np.zeros((0, 0, 0) if self._all else np.add(live.shape, (0, 1, 1)), dtype=np.int32)
        if not self._all:
            counts[:, 1:, 1:] = live.cumsum(axis=1, dtype=np.int32).cumsum(axis=2, dtype=np.int32)
        self._live = counts
        self._known: dict[tuple[int, _Rectangle], tuple[int, int]] = {}
        self._lists: list[Int32] = []
        self._length = 0

    def of(self, task: _Task) -> tuple[int, int]:
        """The first, and how many."""
        group = task.outputs[0] // self._per_group
        key = (-1, _Rectangle(0, 0, 0, 0)) if self._all else (group, task.at)
        if key not in self._known:
            chosen = self._chosen(group, task.at)
            self._known[key] = self._length, len(chosen)
            self._lists.append(chosen)
            self._length += len(chosen)
        return self._known[key]

    def _chosen(self, group: int, r: _Rectangle) -> Int32:
        count = self._conv.weight.shape[1]
        if self._all:
            return np.arange(count, dtype=np.int32)
        g = self._conv.geometry
        spans = []
        for axis, (first, length) in enumerate(((r.row, r.rows), (r.column, r.columns))):
            begin = first * g.stride[axis] - g.before[axis]
            end = (first + length - 1) * g.stride[axis] - g.before[axis] + (g.kernel[axis] - 1) * g.dilation[axis] + 1
            spans.append((min(max(begin, 0), g.input_size[axis]), max(0, min(end, g.input_size[axis]))))
        (top, bottom), (left, right) = spans
        sums = self._live[group * count : (group + 1) * count]
        inside = sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]
        return np.nonzero(inside)[0].astype(np.int32)

    def joined(self) -> Int32:
        return np.concatenate([*self._lists, np.zeros(1, dtype=np.int32)])


class _Values:
    """Scale and shift of the tasks' outputs, one of each where they are the same at all pixels."""

    def __init__(self, fused: Fused, width: int, flat: bool) -> None:
        self._fused, self._width, self._flat = fused, width, flat
        self._uniform = fused.uniform
        self.scale: list[Float] = [np.zeros(0)]
        self.shift: list[Float] = [np.zeros(0)]
        self._length = 0

    def of(self, task: _Task) -> tuple[int, bool]:
        """Where they begin, and whether there is one of each."""
        f, r = self._fused, task.at
        outputs = slice(task.outputs[0], task.outputs[-1] + 1)
        here = np.s_[outputs, r.row : r.row + r.rows, r.column : r.column + r.columns]
        uniform = bool(self._uniform[outputs].all())
        if uniform:
            scale, shift = f.scale[outputs, 0, 0], f.shift[outputs, 0, 0]
        else:
            inside = f.mask[here]
            scale = self._padded(np.where(inside, f.scale[here], 0))
            shift = self._padded(np.where(inside, f.shift[here], f.before[outputs, None, None]))
        start = self._length
        self._length += scale.size
        self.scale.append(scale.reshape(-1))
        self.shift.append(shift.reshape(-1))
        return start, uniform

    def _padded(self, values: Float) -> Float:
        if self._flat:
            values = values.reshape(len(values), 1, -1)
        missing = -values.shape[2] % self._width
        return np.concatenate([values, np.zeros((*values.shape[:2], missing))], axis=2) if missing else values
