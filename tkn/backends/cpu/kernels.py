"""The kernels on rows, from Python: their structures filled from Rows, and the functions on tensors of rows."""

from __future__ import annotations

from ctypes import CDLL, byref, c_int64, c_void_p
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tkn.backends.cpu.build import kernels
from tkn.backends.cpu.rows import Children, Int32, Rows, backward_taps, forward_taps, tile_lanes, tiles_of
from tkn.backends.cpu.structs import (
    SUM,
    ConvStruct,
    DenseStruct,
    Filled,
    FunctionStruct,
    GatherStruct,
    address,
    strided_address,
)
from tkn.geometry import Geometry


@dataclass(frozen=True)
class Tiles:
    """How a batch is cut: `count` tiles of `lanes` images, the last one filled up."""

    batch: int
    lanes: int

    @classmethod
    def of(cls, batch: int, dtype: torch.dtype) -> Tiles:
        return cls(batch, tile_lanes(batch, torch.get_num_threads(), kernels(dtype).tkn_width()))

    @property
    def count(self) -> int:
        return tiles_of(self.batch, self.lanes)

    def shape(self, rows: Rows) -> tuple[int, int, int]:
        """(tiles, rows, lanes)"""
        return self.count, rows.count, self.lanes

    def empty(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Uninitialised rows: [tiles, rows, lanes]."""
        return torch.empty(self.shape(rows), dtype=dtype, device="cpu")


def fill_gather(
    children: Children,
    *,
    child_row: Int32,
    pooling: int = SUM,
    factor: float = 1.0,
    function: FunctionStruct | None = None,
    scale: Any = None,
    shift: Any = None,
    init: Any = None,
) -> Filled:
    """`function`: of each child; `scale`, `shift`: per child; `init`: per output entry. Arrays or tensors of the
    kernels' type."""
    return Filled(GatherStruct()).with_values(
        pixels=len(children.output.order),
        out_start=children.output.start,
        out_base=np.ascontiguousarray(children.output.base),
        child_start=children.start,
        child_row=child_row,
        scale=scale,
        shift=shift,
        init=init,
        factor=factor,
        pooling=pooling,
        function=function or FunctionStruct(),
    )


def fill_conv(
    source: Rows,
    output: Rows,
    geometry: Geometry,
    groups: int,
    lanes: int,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
) -> Filled:
    """A convolution from `source` to `output`, or with `transposed` from a convolution's outputs to its inputs, that
    multiplies numbers of `dtype`.

    The caller sets `weight` [output channels, taps, source channels per group], and scale, shift, function, pooling.
    """
    taps = (backward_taps if transposed else forward_taps)(geometry, output.order)
    table, base, chunks = source.chunks(groups, geometry.taps, lanes, dtype.itemsize)
    src_per_group = source.channels // groups
    return Filled(ConvStruct()).with_values(
        pixels=len(output.order),
        dst_start=output.start,
        dst_channel=output.channel,
        dst_base=np.ascontiguousarray(output.base),
        tap_start=taps[0],
        tap_pixel=taps[1],
        tap_index=taps[2],
        src_start=table,
        src_channel=source.channel,
        src_base=base,
        chunks=chunks,
        groups=groups,
        dst_per_group=output.channels // groups,
        src_per_group=src_per_group,
        weight_dst=geometry.taps * src_per_group,
        weight_tap=src_per_group,
    )


def run_conv(conv: Filled, source: Tensor, output: Tensor) -> None:
    """Rows [tiles, rows, lanes] to rows."""
    _check_alike(source, output)
    kernels(source.dtype).tkn_conv(
        byref(conv.struct), *_tiled(source), *_tiled(output), len(source), source.shape[2], torch.get_num_threads()
    )


def run_conv_bfloat16(conv: Filled, source_rows: Rows, source: Tensor, output: Tensor) -> None:
    """As run_conv, in products of bfloat16: float32 rows to float32 rows, the weight in bfloat16."""
    _check_alike(source, output)
    pairs = torch.empty_like(source)
    kernels(torch.float32).tkn_conv_bfloat16(
        byref(conv.struct),
        *_tiled(source),
        *_tiled(output),
        source_rows.pixels,
        address(pairs),
        len(source),
        source.shape[2],
        torch.get_num_threads(),
    )


def run_gather(gather: Filled, source: Tensor, output: Tensor) -> None:
    """Rows [tiles, rows, lanes] to rows."""
    _check_alike(source, output)
    kernels(source.dtype).tkn_gather(
        byref(gather.struct), *_tiled(source), *_tiled(output), len(source), source.shape[2], torch.get_num_threads()
    )


def run_gather_backward(
    gather: Filled, source: Tensor, grad_output: Tensor, grad_source: Tensor, grad_scale: Tensor | None
) -> None:
    """Gradients of a gather: of its source's rows and of `scale` [children]."""
    _check_alike(source, grad_output, grad_source)
    kernels(source.dtype).tkn_gather_backward(
        byref(gather.struct),
        address(source),
        address(grad_output),
        address(grad_source),
        None if grad_scale is None else address(grad_scale),
        c_int64(source.stride(0)),
        c_int64(grad_output.stride(0)),
        len(source),
        source.shape[2],
        torch.get_num_threads(),
    )


def run_weight_grad(conv: Filled, source_rows: Rows, source: Tensor, grad: Tensor, weight_grad: Tensor) -> None:
    """Adds the gradient of the weight to `weight_grad` [O, taps, C per group], zero before.

    `source`, `grad`: rows of the input and of the output's gradient; of bfloat16 for a `weight_grad` of float32.
    """
    _check_alike(source, grad)
    pairs = source.dtype == torch.bfloat16
    if pairs:  # two images in the place of one
        source, grad = source.view(torch.float32), grad.view(torch.float32)
    loaded = kernels(source.dtype)
    width = loaded.tkn_width()
    tiles, _, lanes = source.shape
    count = np.zeros(source_rows.pixels, dtype=np.int64)
    count[source_rows.order] = np.diff(source_rows.start)
    padded = (count + width - 1) // width * width * lanes
    start = np.cumsum(padded) - padded
    columns = torch.empty(tiles * int(padded.sum()) + 8 * width, dtype=source.dtype, device="cpu")
    loaded.tkn_weight_grad(
        byref(conv.struct),
        *_tiled(source),
        *_tiled(grad),
        address(weight_grad),
        weight_grad.shape[1],
        source_rows.pixels,
        address(start),
        address(columns),
        c_int64(int(padded.sum())),
        tiles,
        lanes,
        pairs,
        torch.get_num_threads(),
    )


def contiguous(rows: Rows, outside: NDArray[Any] | None = None) -> Filled:
    """Rows of a contiguous [B, C, *size]; `outside`: its value without a row, per channel."""
    *above, width = rows.size
    height = prod(above)  # lines of all other axes
    return Filled(DenseStruct()).with_values(
        channels=rows.channels,
        height=height,
        width=width,
        image=rows.channels * height * width,
        channel=height * width,
        row=width,
        column=1,
        rows=rows.dense,
        outside=outside,
    )


def _dense(x: Tensor, rows: Rows) -> Filled:
    """Rows of x [B, C, *size] whose lines are evenly apart."""
    image, channel, *_ = x.stride()
    row = x.stride(-2) if x.dim() > 3 else 0  # in one dimension a map is one line
    return contiguous(rows).with_values(image=image, channel=channel, row=row, column=x.stride(-1))


def _even_lines(x: Tensor) -> Tensor:
    """x [B, C, *size], or in three dimensions a copy unless its lines are evenly apart."""
    return x.contiguous() if x.dim() == 5 and x.stride(2) != x.shape[3] * x.stride(3) else x


def pack(x: Tensor, rows: Rows, tiles: Tiles) -> Tensor:
    """[B, C, *size] in any layout to rows [tiles, rows, lanes] of its type; lanes without an image are zero."""
    if x.shape != (tiles.batch, rows.channels, *rows.size):
        raise ValueError(f"images of shape {list(x.shape)} are not {[tiles.batch, rows.channels, *rows.size]}")
    x = _even_lines(x.resolve_neg())  # a view may owe the sign
    packed = tiles.empty(rows, x.dtype)
    loaded, halves = _moving(x.dtype)
    loaded.tkn_pack(
        byref(_dense(x, rows).struct),
        strided_address(x),
        tiles.batch,
        *_tiled(packed),
        tiles.count,
        tiles.lanes,
        halves,
        torch.get_num_threads(),
    )
    return packed


def unpack(packed: Tensor, rows: Rows, batch: int, *, channels_last: bool = False) -> Tensor:
    """Rows [tiles, rows, lanes] to [B, C, *size], zero where there is no row."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (batch, rows.channels, *rows.size)
    x = torch.empty(shape, dtype=packed.dtype, device="cpu", memory_format=memory_format)
    loaded, halves = _moving(x.dtype)
    loaded.tkn_unpack(
        byref(_dense(x, rows).struct),
        *_tiled(packed),
        strided_address(x),
        batch,
        len(packed),
        packed.shape[2],
        halves,
        torch.get_num_threads(),
    )
    return x


def _moving(dtype: torch.dtype) -> tuple[CDLL, bool]:
    """The kernels that pack numbers of `dtype`, and whether these are halves, which those of float32 pack too."""
    halves = dtype.itemsize == 2
    return kernels(torch.float32 if halves else dtype), halves


def _check_alike(rows: Tensor, *others: Tensor) -> None:
    """ValueError unless all are rows of one type, in as many tiles of as many lanes."""
    for other in others:
        if other.dtype != rows.dtype or (len(other), other.shape[2]) != (len(rows), rows.shape[2]):
            raise ValueError(f"rows of {other.dtype} {list(other.shape)} beside {rows.dtype} {list(rows.shape)}")


def _tiled(rows: Tensor) -> tuple[c_void_p, c_int64]:
    return address(rows), c_int64(rows.stride(0))
