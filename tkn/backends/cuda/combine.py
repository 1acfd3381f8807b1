"""Rows made of others without weights: sums, means and maxima of scaled rows, for poolings, sums and normalisations."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: Rows and images of a program.
_ROWS, _IMAGES = 8, 128


def combine(
    memory: Tensor, out: Tensor, child: Tensor, scale: Tensor, shift: Tensor, *, relu: bool, maximum: bool
) -> None:
    """Put into `out` [rows, images] the sum or the maximum over each row's children of relu?(scale * x + shift).

    x: the rows `child`, int32 [rows, n], of `memory`; not read where `scale`, float32 [rows, n], is zero.
    """
    rows, count = child.shape
    images = out.shape[1]
    _combine_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(images, _IMAGES))](
        memory, out, child, scale, shift, rows, images, count, relu, maximum, _ROWS, _IMAGES
    )


@triton.jit
def _combine_kernel(
    memory,
    out,
    child,
    scale,
    shift,
    rows,
    images,
    COUNT: tl.constexpr,
    RELU: tl.constexpr,
    MAXIMUM: tl.constexpr,
    ROWS: tl.constexpr,
    IMAGES: tl.constexpr,
):
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
    used, inside = e < rows, (b < images)[None, :]
    start = float("-inf") if MAXIMUM else 0.0
    total = tl.full((ROWS, IMAGES), start, tl.float32)
    for j in range(COUNT):
        at = e * COUNT + j
        a = tl.load(scale + at, mask=used, other=0.0)
        c = tl.load(child + at, mask=used, other=0).to(tl.int64)
        read = (a != 0)[:, None] & inside
        x = tl.load(memory + c[:, None] * images + b[None, :], mask=read, other=0.0).to(tl.float32)
        x = x * a[:, None] + tl.load(shift + at, mask=used, other=0.0)[:, None]
        if RELU:
            x = tl.where(x < 0, 0.0, x)
        if MAXIMUM:
            # NaN comes before all.
            total = tl.where((x > total) | (x != x), x, total)
        else:
            total += x
    tl.store(
        out + e.to(tl.int64)[:, None] * images + b[None, :], total.to(out.dtype.element_ty), mask=used[:, None] & inside
    )
