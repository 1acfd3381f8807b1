"""What follows a convolution, in rows: window (Eq. 13), ReLU and pooling in one pass, and their gradient in one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkn.backends.cuda.rows import Rows
from tkn.geometry import Pool

#: Rows and images of a program.
_ROWS, _IMAGES = 8, 128


@dataclass(frozen=True, eq=False)
class Children:
    """For each row of `output` the rows of `convolved` that its pooling reads: int32 [capacity, children]."""

    convolved: Rows
    output: Rows
    child: Tensor

    @staticmethod
    def of(
        convolved: Rows, mask: Tensor, pool: Pool | None, *, headroom: float = 1.0, capacity: int | None = None
    ) -> Children:
        """`mask`: bool [C, H, W], the rows that there are of `convolved`. The others are those of the pooled rows."""
        if pool is None:
            child = torch.arange(convolved.capacity, dtype=torch.int32, device=mask.device)[:, None]
            return Children(convolved, convolved, child)
        height, width = pool.kernel
        rows, columns = pool.output_size(convolved.size)
        windows = (
            mask[:, : rows * height, : columns * width].unflatten(2, (columns, width)).unflatten(1, (rows, height))
        )
        output = Rows.of(windows.any(dim=4).any(dim=2), headroom=headroom, capacity=capacity)
        at = output.pixel.long()
        y, x = at // columns * height, at % columns * width
        down, right = (torch.arange(length, device=mask.device) for length in pool.kernel)
        pixel = ((y[:, None] + down)[:, :, None] * convolved.size[1] + (x[:, None] + right)[:, None, :]).flatten(1)
        child = convolved.row[output.channel.long()[:, None] * convolved.pixels + pixel]
        return Children(convolved, output, child)

    @property
    def count(self) -> int:
        return self.child.shape[1]


def pool(
    z: Tensor, window: Tensor, children: Children, *, relu: bool, average: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """Rows of the convolution -> rows of the layer, and with `keep` which child each came from: uint8 [rows, images].

    `window`: float32 [capacity + 1] of the convolution's rows.
    """
    images, output = z.shape[1], children.output
    y = torch.empty(output.capacity + 1, images, dtype=z.dtype, device=z.device)
    kept = torch.empty(y.shape if keep else (1, 1), dtype=torch.uint8, device=z.device)
    _pool_kernel[(triton.cdiv(output.capacity + 1, _ROWS), triton.cdiv(images, _IMAGES))](
        z,
        window,
        y,
        kept,
        children.child,
        output.live,
        images,
        output.capacity,
        1 / children.count,
        children.count,
        relu,
        average,
        keep,
        _ROWS,
        _IMAGES,
    )
    return y, kept


def pool_gradient(
    grad: Tensor, z: Tensor, window: Tensor, kept: Tensor, children: Children, *, relu: bool, average: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of the layer's rows: that of the convolution's, that of its window [capacity + 1] in float32,
    and the sums over the images of the first [capacity + 1], for the bias."""
    images, convolved = z.shape[1], children.convolved
    of_z = torch.empty_like(z)
    of_z[-1].zero_()
    of_window = torch.zeros(convolved.capacity + 1, dtype=torch.float32, device=z.device)
    sums = torch.zeros_like(of_window)
    _pool_gradient_kernel[(triton.cdiv(children.output.capacity, _ROWS),)](
        grad,
        z,
        window,
        kept,
        of_z,
        of_window,
        sums,
        children.child,
        children.output.live,
        images,
        convolved.capacity,
        1 / children.count,
        children.count,
        triton.next_power_of_2(children.count),
        relu,
        average,
        _ROWS,
        _IMAGES,
    )
    return of_z, of_window, sums


@triton.jit
def _pool_kernel(
    z,
    window,
    y,
    kept,
    child,
    live,
    images,
    capacity,
    share,
    COUNT: tl.constexpr,
    RELU: tl.constexpr,
    AVERAGE: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    IMAGES: tl.constexpr,
):
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
    used = e < tl.load(live)
    inside = used[:, None] & (b < images)[None, :]
    total = tl.zeros((ROWS, IMAGES), tl.float32)
    # 255: none of the children was passed on.
    best = tl.full((ROWS, IMAGES), 255, tl.int32)
    for j in tl.static_range(COUNT):
        c = tl.load(child + e * COUNT + j, mask=used, other=0).to(tl.int64)
        a = tl.load(z + c[:, None] * images + b[None, :], mask=inside, other=0.0).to(tl.float32)
        a *= tl.load(window + c, mask=used, other=0.0)[:, None]
        if AVERAGE:
            if RELU:
                a = tl.where(a < 0, 0.0, a)
            total += a * share
        else:
            # As torch: the first of equal ones, and NaN before all.
            larger = (a > total) | (a != a)
            if j == 0 and not RELU:
                larger = b[None, :] >= 0
            best = tl.where(larger, j, best)
            total = tl.where(larger, a, total)
    at = e.to(tl.int64)[:, None] * images + b[None, :]
    # The last row is zero.
    stored = (used | (e == capacity))[:, None] & (b < images)[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=stored)
    if KEEP:
        tl.store(kept + at, best.to(tl.uint8), mask=inside)


@triton.jit
def _pool_gradient_kernel(
    grad,
    z,
    window,
    kept,
    of_z,
    of_window,
    sums,
    child,
    live,
    images,
    in_capacity,
    share,
    COUNT: tl.constexpr,
    WIDE: tl.constexpr,
    RELU: tl.constexpr,
    AVERAGE: tl.constexpr,
    ROWS: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """Of some rows of the output, over all images: every child has one parent."""
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = e < tl.load(live)
    place = tl.arange(0, WIDE)
    by_window, by_image = tl.zeros((ROWS, WIDE), tl.float32), tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(0, images, IMAGES):
        b = start + tl.arange(0, IMAGES)
        inside = used[:, None] & (b < images)[None, :]
        at = e.to(tl.int64)[:, None] * images + b[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if AVERAGE:
            g *= share
            best = tl.zeros((ROWS, IMAGES), tl.int32)
        else:
            best = tl.load(kept + at, mask=inside, other=255).to(tl.int32)
        for j in tl.static_range(COUNT):
            c = tl.load(child + e * COUNT + j, mask=used, other=0).to(tl.int64)
            w = tl.load(window + c, mask=used, other=0.0)[:, None]
            there = inside & (c < in_capacity)[:, None]
            v = tl.load(z + c[:, None] * images + b[None, :], mask=there, other=0.0).to(tl.float32)
            # As torch: what is no number passes the ReLU.
            passed = tl.where(w * v <= 0, 0.0, g) if RELU else g
            mine = passed if AVERAGE else tl.where(best == j, g, 0.0)
            tl.store(of_z + c[:, None] * images + b[None, :], (mine * w).to(of_z.dtype.element_ty), mask=there)
            here = place[None, :] == j
            by_window += tl.where(here, tl.sum(mine * v, 1)[:, None], 0.0)
            by_image += tl.where(here, tl.sum(mine * w, 1)[:, None], 0.0)
    c = tl.load(child + e[:, None] * COUNT + place[None, :], mask=used[:, None] & (place < COUNT)[None, :], other=0)
    there = used[:, None] & (place < COUNT)[None, :] & (c < in_capacity)
    tl.store(of_window + c, by_window, mask=there)
    tl.store(sums + c, by_image, mask=there)
