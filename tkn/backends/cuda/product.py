"""The gathered matrix product that is every convolution here, and the gradient of its weights.

    y[tile] (64 x images) = packed[tile] (64 x K) @ x[rows[tile]] (K x images)

`rows[tile]` are a tile's inputs (lists.py); the packed weights are zero where a tap does not reach. The gradient of the
inputs is the same product on lists with the roles exchanged. That of the packed weights is y's gradient times the
inputs; each weight then adds up its own entries of it, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkn.backends.cuda.lists import Lists
from tkn.backends.cuda.reach import geometry_arguments, tap
from tkn.backends.cuda.rows import TILE

#: Pixels and channels that a program adds up together.
_PIXELS, _CHANNELS = 16, 32


@dataclass(frozen=True)
class Epilogue:
    """What follows a product: times `scale`, plus `shift`, both float32 [capacity] or more, of each row; ReLU."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    relu: bool = False


def pack(weight: Tensor, lists: Lists, groups: int, dtype: torch.dtype) -> Tensor:
    """The weights [O, C / groups, kH, kW] as the product reads them: [blocks, 64, depth]."""
    packed = torch.empty(lists.blocks, TILE, lists.depth, dtype=dtype, device=weight.device)
    # What a program reads side by side lies side by side: input channels, or with flipped lists output channels.
    order = (2, 3, 1, 0) if lists.flip else (2, 3, 0, 1)
    inverse = (3, 2, 0, 1) if lists.flip else (2, 3, 0, 1)
    weight = weight.permute(order).contiguous().permute(inverse)
    outputs, per_group = weight.shape[:2]
    _pack_kernel[(lists.blocks,)](
        weight,
        packed,
        lists.rows,
        lists.tile_of,
        lists.first,
        lists.tiles,
        lists.outputs.pixel,
        lists.outputs.channel,
        lists.outputs.live,
        lists.inputs.pixel,
        lists.inputs.channel,
        lists.inputs.capacity,
        lists.outputs.size[1],
        lists.inputs.size[1],
        outputs // groups,
        per_group,
        *weight.stride(),
        *geometry_arguments(lists.geometry),
        lists.flip,
        TILE,
        lists.depth,
    )
    return packed


def multiply(
    x: Tensor,
    packed: Tensor,
    lists: Lists,
    epilogue: Epilogue,
    *,
    tf32: bool,
    rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of the inputs [capacity + 1, images] -> those of the outputs, in the same type.

    The images are a multiple of 16. `tf32`: round the factors of float32 products to it. `rows`: which rows of x are
    meant in the place of `lists.rows`; `out`: where the result is put.
    """
    images = x.shape[1]
    columns = _columns(images)
    parts = _parts(lists, triton.cdiv(images, columns), x.device)
    y = out
    if y is None:
        y = torch.empty(lists.outputs.capacity + 1, images, dtype=x.dtype, device=x.device)
    to = y if parts == 1 else torch.empty(parts, *y.shape, dtype=torch.float32, device=x.device)
    scale, shift = _or(epilogue.scale, x), _or(epilogue.shift, x)
    given = (epilogue.scale is not None, epilogue.shift is not None, epilogue.relu)
    in_product = given if parts == 1 else (False, False, False)
    _product_kernel[(lists.tiles, triton.cdiv(images, columns), parts)](
        x,
        packed,
        to,
        lists.rows if rows is None else rows,
        lists.first,
        scale,
        shift,
        lists.outputs.live,
        images,
        lists.outputs.capacity,
        *in_product,
        tf32,
        parts,
        TILE,
        lists.depth,
        columns,
        num_warps=4,
        num_stages=4 if x.dtype.itemsize == 2 else 3,
    )
    if parts > 1:
        _sum_kernel[(lists.tiles, triton.cdiv(images, columns))](
            to,
            y,
            scale,
            shift,
            lists.outputs.live,
            images,
            lists.outputs.capacity,
            *given,
            parts,
            TILE,
            columns,
        )
    return y


def weight_gradient(
    grad: Tensor, x: Tensor, lists: Lists, bounds: Tensor, shape: torch.Size, groups: int, *, tf32: bool
) -> Tensor:
    """The gradient [O, C / groups, kH, kW] of the weights, in float32.

    From the gradient of the outputs' rows and the inputs' rows, both [capacity + 1, images]. `bounds`: int32
    [O, 2, 2], the rectangle (lo, hi by axis) whose pixels are a kernel's rows.
    """
    images = x.shape[1]
    of_packed = torch.empty(lists.blocks, TILE, lists.depth, dtype=torch.float32, device=x.device)
    _packed_gradient_kernel[(lists.blocks,)](
        grad,
        x,
        of_packed,
        lists.rows,
        lists.tile_of,
        lists.first,
        lists.tiles,
        lists.outputs.live,
        images,
        tf32,
        TILE,
        lists.depth,
        # More of float32 would not fit into the shared memory of all GPUs.
        _columns(images) if x.dtype.itemsize == 2 else min(64, _columns(images)),
        num_warps=4,
        num_stages=4 if x.dtype.itemsize == 2 else 3,
    )
    outputs, per_group = shape[:2]
    result = torch.empty(shape, dtype=torch.float32, device=x.device)
    geometry = lists.geometry
    _gather_gradient_kernel[(outputs, triton.cdiv(per_group, _CHANNELS), geometry.taps)](
        of_packed,
        result,
        bounds,
        lists.outputs.row,
        lists.inputs.row,
        lists.inputs.first,
        lists.box,
        lists.box_first,
        lists.offset,
        lists.first,
        *lists.outputs.size,
        *lists.inputs.size,
        lists.outputs.capacity,
        lists.inputs.capacity,
        outputs // groups,
        per_group,
        *geometry_arguments(geometry),
        TILE,
        lists.depth,
        _PIXELS,
        _CHANNELS,
    )
    return result


def _columns(images: int) -> int:
    """Images that a program computes."""
    return 16 if images <= 16 else 32 if images <= 32 else 64 if images <= 256 else 128


def _parts(lists: Lists, columns: int, device: torch.device) -> int:
    """Parts of a tile's list that different programs take where there are too few tiles to keep a GPU busy."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    programs = lists.tiles * columns
    parts = 1
    # At least two blocks are left to a program.
    while parts < 8 and programs * parts < 2 * processors and lists.blocks >= 4 * parts * lists.tiles:
        parts *= 2
    return parts


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is given in the place of a tensor that it does not read."""
    return other if tensor is None else tensor


@triton.jit
def _pack_kernel(
    weight,
    packed,
    rows,
    tile_of,
    first,
    tiles,
    out_pixel,
    out_channel,
    live,
    in_pixel,
    in_channel,
    in_capacity,
    out_width,
    in_width,
    outputs_per_group,
    inputs_per_group,
    so,
    sc,
    sh,
    sw,
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
    DEPTH: tl.constexpr,
):
    """A block of the packed weights."""
    it = tl.program_id(0)
    if it < tl.load(first + tiles):
        m, k = tl.arange(0, TILE), tl.arange(0, DEPTH)
        e = tl.load(tile_of + it) * TILE + m
        r = tl.load(rows + it * DEPTH + k)
        there = r < in_capacity
        at, q = tl.load(out_pixel + e), tl.load(in_pixel + r, mask=there, other=0)
        c_out, c_in = tl.load(out_channel + e), tl.load(in_channel + r, mask=there, other=0)
        ty = tap((at // out_width)[:, None], (q // in_width)[None, :], sy, py, dy, ky, FLIP)
        tx = tap((at % out_width)[:, None], (q % in_width)[None, :], sx, px, dx, kx, FLIP)
        if FLIP:
            o, c = c_in[None, :], c_out[:, None]
        else:
            o, c = c_out[:, None], c_in[None, :]
        same_group = o // outputs_per_group == c // inputs_per_group
        used = (ty >= 0) & (tx >= 0) & same_group & there[None, :] & (e < tl.load(live))[:, None]
        index = o * so + (c % inputs_per_group) * sc + ty * sh + tx * sw
        value = tl.load(weight + index, mask=used, other=0.0)
        to = packed + it.to(tl.int64) * (TILE * DEPTH) + m[:, None] * DEPTH + k[None, :]
        tl.store(to, value.to(packed.dtype.element_ty))


@triton.jit
def _finished(y, scale, shift, e, used, SCALE: tl.constexpr, SHIFT: tl.constexpr, RELU: tl.constexpr):
    """Sums [64, images] with what follows them."""
    if SCALE:
        y *= tl.load(scale + e, mask=used, other=0.0)[:, None]
    if SHIFT:
        y += tl.load(shift + e, mask=used, other=0.0)[:, None]
    if RELU:
        # NaN stays NaN.
        y = tl.where(y < 0, 0.0, y)
    return y


@triton.jit
def _store(y, total, tile, e, b, used, images, capacity, COLUMNS: tl.constexpr):
    """Put a tile's rows into y; the first tile's program also makes the last row zero."""
    to = y + e.to(tl.int64)[:, None] * images + b[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=used[:, None] & (b < images)[None, :])
    if tile == 0:
        last = y + tl.cast(capacity, tl.int64) * images + b
        tl.store(last, tl.zeros((COLUMNS,), y.dtype.element_ty), mask=b < images)


@triton.jit
def _product_kernel(
    x,
    packed,
    y,
    rows,
    first,
    scale,
    shift,
    live,
    images,
    capacity,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    TF32: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile's product with so many images, or a part of its sums."""
    tile, part = tl.program_id(0), tl.program_id(2)
    b = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m, k = tl.arange(0, TILE), tl.arange(0, DEPTH)
    e = tile * TILE + m
    used = e < tl.load(live)
    begin, end = tl.load(first + tile), tl.load(first + tile + 1)
    length = end - begin
    end = begin + length * (part + 1) // PARTS
    begin += length * part // PARTS
    inside = (b < images)[None, :]
    total = tl.zeros((TILE, COLUMNS), tl.float32)
    rows += begin * DEPTH
    packed += begin.to(tl.int64) * (TILE * DEPTH)
    for _ in range(begin, end):
        r = tl.load(rows + k).to(tl.int64)
        w = tl.load(packed + m[:, None] * DEPTH + k[None, :])
        v = tl.load(x + r[:, None] * images + b[None, :], mask=inside, other=0.0)
        total = tl.dot(w, v, total, input_precision="tf32" if TF32 else "ieee")
        rows += DEPTH
        packed += TILE * DEPTH
    total = _finished(total, scale, shift, e, used, SCALE, SHIFT, RELU)
    y += part.to(tl.int64) * (capacity + 1) * images
    _store(y, total, tile, e, b, used, images, capacity, COLUMNS)


@triton.jit
def _sum_kernel(
    parts_of,
    y,
    scale,
    shift,
    live,
    images,
    capacity,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum of the parts of a tile's product."""
    tile = tl.program_id(0)
    b = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    e = tile * TILE + tl.arange(0, TILE)
    used, inside = e < tl.load(live), (b < images)[None, :]
    at = e.to(tl.int64)[:, None] * images + b[None, :]
    total = tl.zeros((TILE, COLUMNS), tl.float32)
    for _ in tl.static_range(PARTS):
        total += tl.load(parts_of + at, mask=used[:, None] & inside, other=0.0)
        parts_of += tl.cast(capacity + 1, tl.int64) * images
    total = _finished(total, scale, shift, e, used, SCALE, SHIFT, RELU)
    _store(y, total, tile, e, b, used, images, capacity, COLUMNS)


@triton.jit
def _packed_gradient_kernel(
    grad,
    x,
    of_packed,
    rows,
    tile_of,
    first,
    tiles,
    live,
    images,
    TF32: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of the gradient of the packed weights: the gradients of a tile times the inputs of the block."""
    it = tl.program_id(0)
    if it < tl.load(first + tiles):
        m, k = tl.arange(0, TILE), tl.arange(0, DEPTH)
        e = tl.load(tile_of + it) * TILE + m
        used = (e < tl.load(live))[:, None]
        r = tl.load(rows + it * DEPTH + k).to(tl.int64)
        total = tl.zeros((TILE, DEPTH), tl.float32)
        for start in range(0, images, COLUMNS):
            b = start + tl.arange(0, COLUMNS)
            inside = (b < images)[None, :]
            g = tl.load(grad + e.to(tl.int64)[:, None] * images + b[None, :], mask=used & inside, other=0.0)
            v = tl.load(x + r[:, None] * images + b[None, :], mask=inside, other=0.0)
            total = tl.dot(g, tl.trans(v), total, input_precision="tf32" if TF32 else "ieee")
        tl.store(of_packed + it.to(tl.int64) * (TILE * DEPTH) + m[:, None] * DEPTH + k[None, :], total)


@triton.jit
def _gather_gradient_kernel(
    of_packed,
    result,
    bounds,
    out_row,
    in_row,
    in_first,
    box,
    box_first,
    offset,
    first,
    out_height,
    out_width,
    in_height,
    in_width,
    out_capacity,
    in_capacity,
    outputs_per_group,
    inputs_per_group,
    sy,
    sx,
    py,
    px,
    dy,
    dx,
    ky,
    kx,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One tap's weights of a kernel and some channels: the sum over the pixels of its ROI."""
    o, of_tap = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = c < inputs_per_group
    top, bottom = tl.load(bounds + o * 4), tl.load(bounds + o * 4 + 1)
    left, right = tl.load(bounds + o * 4 + 2), tl.load(bounds + o * 4 + 3)
    area, wide = (bottom - top) * (right - left), tl.maximum(right - left, 1)
    c_in = (o // outputs_per_group) * inputs_per_group + c
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for start in range(0, area, PIXELS):
        i = start + tl.arange(0, PIXELS)
        y, x = top + i // wide, left + i % wide
        qy, qx = y * sy - py + (of_tap // kx) * dy, x * sx - px + (of_tap % kx) * dx
        inside = (i < area) & (qy >= 0) & (qy < in_height) & (qx >= 0) & (qx < in_width)
        q = qy * in_width + qx
        e = tl.load(out_row + o * (out_height * out_width) + y * out_width + x, mask=inside, other=0)
        inside &= e < out_capacity
        tile = e // TILE
        by, bx = tl.load(box + tile * 4, mask=inside, other=0), tl.load(box + tile * 4 + 1, mask=inside, other=0)
        box_width = tl.load(box + tile * 4 + 3, mask=inside, other=0)
        in_box = tl.load(box_first + tile, mask=inside, other=0) + (qy - by) * box_width + qx - bx
        at = tl.load(offset + in_box, mask=inside, other=-1)
        begin = at - tl.load(in_first + q, mask=inside, other=0)
        block = tl.load(first + tile, mask=inside, other=0)
        there = (inside & (at >= 0))[:, None] & known[None, :]
        r = tl.load(in_row + c_in[None, :] * (in_height * in_width) + q[:, None], mask=there, other=0)
        there &= r < in_capacity
        k = begin[:, None] + r
        index = ((block[:, None] + k // DEPTH).to(tl.int64) * TILE + (e % TILE)[:, None]) * DEPTH + k % DEPTH
        total += tl.load(of_packed + index, mask=there, other=0.0)
    to = (o * inputs_per_group + c) * (ky * kx) + of_tap
    tl.store(result + to, tl.sum(total, 0), mask=known)
