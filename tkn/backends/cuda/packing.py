"""Between dense batches and rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkn.backends.cuda.rows import Rows, round_up

#: Rows or numbers, and images, of a program.
_NUMBERS, _IMAGES = 32, 32


def padded(images: int) -> int:
    """Images as rows have them: a multiple of 16, the rest zero."""
    return round_up(images, 16)


def to_rows(x: Tensor, rows: Rows, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """x [B, C, H, W], of any strides -> [capacity + 1, `padded` images] of `dtype`, or into `out` of more images."""
    y = out
    if y is None:
        y = torch.empty(rows.capacity + 1, padded(len(x)), dtype=dtype, device=x.device)
    images = y.shape[1]
    _to_rows_kernel[(triton.cdiv(rows.capacity + 1, _NUMBERS), triton.cdiv(images, _IMAGES))](
        x,
        y,
        rows.pixel,
        rows.channel,
        rows.live,
        rows.size[1],
        len(x),
        images,
        rows.capacity,
        *x.stride(),
        _NUMBERS,
        _IMAGES,
    )
    return y


def from_rows(
    y: Tensor, rows: Rows, batch: int, dtype: torch.dtype, *, channels_last: bool, row: Tensor | None = None
) -> Tensor:
    """Rows [capacity + 1, images] -> [batch, C, H, W] of `dtype`, zero where there is no row. `row`: where the numbers
    of a map are in y, in the place of `rows.row`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(batch, rows.channels, *rows.size, dtype=dtype, device=y.device, memory_format=layout)
    numbers = rows.channels * rows.pixels
    _from_rows_kernel[(triton.cdiv(numbers, _NUMBERS), triton.cdiv(batch, _IMAGES))](
        y,
        x,
        rows.row if row is None else row,
        numbers,
        rows.channels,
        rows.pixels,
        y.shape[1],
        batch,
        channels_last,
        _NUMBERS,
        _IMAGES,
    )
    return x


@triton.jit
def _to_rows_kernel(
    x,
    y,
    pixel,
    channel,
    live,
    width,
    batch,
    images,
    capacity,
    sb,
    sc,
    sh,
    sw,
    NUMBERS: tl.constexpr,
    IMAGES: tl.constexpr,
):
    e = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    b = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
    used = e < tl.load(live)
    at, c = tl.load(pixel + e, mask=used, other=0), tl.load(channel + e, mask=used, other=0)
    index = c.to(tl.int64) * sc + (at // width).to(tl.int64) * sh + (at % width).to(tl.int64) * sw
    there = used[:, None] & (b < batch)[None, :]
    value = tl.load(x + index[:, None] + b.to(tl.int64)[None, :] * sb, mask=there, other=0.0)
    to = y + e.to(tl.int64)[:, None] * images + b[None, :]
    tl.store(to, value.to(y.dtype.element_ty), mask=(e <= capacity)[:, None] & (b < images)[None, :])


@triton.jit
def _from_rows_kernel(
    y,
    x,
    row,
    numbers,
    channels,
    pixels,
    images,
    batch,
    LAST: tl.constexpr,
    NUMBERS: tl.constexpr,
    IMAGES: tl.constexpr,
):
    i = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    b = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
    inside = i < numbers
    # In the order of memory: pixels within channels, or channels within pixels.
    number = (i % channels) * pixels + i // channels if LAST else i
    r = tl.load(row + number, mask=inside, other=0).to(tl.int64)
    there = inside[:, None] & (b < batch)[None, :]
    value = tl.load(y + r[:, None] * images + b[None, :], mask=there, other=0.0)
    to = x + b.to(tl.int64)[None, :] * numbers + i[:, None]
    tl.store(to, value.to(x.dtype.element_ty), mask=there)
