"""Target layers inside their ROIs, with gradients: rows in, rows out.

A stage is a target layer and what follows it: convolution, window, ReLU, pooling. Forward, input gradient, weight
gradient and the window's gradient (and with it those of loc and scale) are all computed inside ROIs only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tkn.backends.cpu.build import kernels
from tkn.backends.cpu.kernels import (
    Tiles,
    fill_conv,
    fill_gather,
    pack,
    run_conv,
    run_conv_bfloat16,
    run_gather,
    run_gather_backward,
    run_weight_grad,
    unpack,
)
from tkn.backends.cpu.rows import Bool, Children, Int32, Rows, pooled_order
from tkn.backends.cpu.structs import MAX, SUM, Filled
from tkn.geometry import Geometry, Pool


@dataclass(frozen=True)
class Activation:
    """An activation of a batch as rows [tiles, rows, lanes]."""

    data: Tensor
    rows: Rows
    tiles: Tiles

    @classmethod
    def pack(cls, x: Tensor, dtype: torch.dtype | None = None) -> Activation:
        """All of [B, C, H, W], in rows of `dtype`, its own by default."""
        dtype = dtype or x.dtype
        tiles = Tiles.of(len(x), dtype)
        rows = Rows.full(x.shape[1], (x.shape[2], x.shape[3]))
        return cls(_Pack.apply(x, rows, tiles).to(dtype), rows, tiles)

    def unpack(self, *, channels_last: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """[B, C, H, W] of `dtype`, the rows' own by default, zero where there is no row."""
        # Converted as rows, of which there are fewer numbers.
        return _Unpack.apply(self.data.to(dtype or self.data.dtype), self.rows, self.tiles, channels_last)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows, tiles: Tiles) -> Tensor:
        ctx.rows, ctx.tiles = rows, tiles
        ctx.channels_last = x.stride(1) == 1 and x.shape[1] > 1
        return pack(x, rows, tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return unpack(grad.contiguous(), ctx.rows, ctx.tiles.batch, channels_last=ctx.channels_last), None, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, data: Tensor, rows: Rows, tiles: Tiles, channels_last: bool) -> Tensor:
        ctx.rows, ctx.tiles = rows, tiles
        return unpack(data, rows, tiles.batch, channels_last=channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return pack(grad, ctx.rows, ctx.tiles), None, None, None


@dataclass(frozen=True, eq=False)
class Stage:
    """The lists of one target layer and its ReLU and pooling, for one state of its ROIs.

    `mask`: bool [C, H, W], the pixels inside the ROIs. `dtype`: of the rows, the parameters and the sums. `bfloat16`:
    round the factors of float32 products to it where that is faster.
    """

    source: Rows
    mask: Bool
    geometry: Geometry
    groups: int
    relu: bool
    pool: Pool | None
    tiles: Tiles
    dtype: torch.dtype
    bfloat16: bool = False

    @cached_property
    def convolved(self) -> Rows:
        """The convolution's outputs: those of the ROI that the pooling reads."""
        return Rows.of(self.mask, pooled_order(self.pool, self.geometry.output_size))

    @cached_property
    def children(self) -> Children:
        return Children.same(self.convolved) if self.pool is None else Children.pooled(self.convolved, self.pool)

    @property
    def output(self) -> Rows:
        return self.children.output

    @cached_property
    def forward_conv(self) -> Filled:
        dtype = self._multiplied(self.source)
        return fill_conv(self.source, self.convolved, self.geometry, self.groups, self.tiles.lanes, dtype)

    @cached_property
    def backward_conv(self) -> Filled:
        dtype = self._multiplied(self.convolved)
        return fill_conv(
            self.convolved, self.source, self.geometry, self.groups, self.tiles.lanes, dtype, transposed=True
        )

    def _multiplied(self, source: Rows) -> torch.dtype:
        """The type of the factors of a convolution of `source`: pairs of few channels would not fill the vectors."""
        loaded = kernels(self.dtype)
        faster = loaded.tkn_bfloat16() and source.channels // self.groups >= loaded.tkn_width()
        return torch.bfloat16 if self.bfloat16 and faster else self.dtype

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Rows of `source` to those of `convolved`. `weight` [O, C / groups, kH, kW]."""
        channel = torch.from_numpy(self.convolved.channel)
        conv = self.forward_conv.having(shift=None if bias is None else bias[channel])
        # [O, taps, C / groups]: in float32 no copy for weights in channels_last.
        return self._run(conv, self.source, x, weight.permute(0, 2, 3, 1), self.convolved)

    def input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Rows of `source`, from the gradient of the convolution's outputs."""
        by_group = weight.unflatten(0, (self.groups, -1))
        # [C, taps, O / groups]: the roles of inputs and outputs change.
        return self._run(self.backward_conv, self.convolved, grad, by_group.permute(0, 2, 3, 4, 1), self.source)

    def weight_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """[O, taps, C / groups], from rows of the input and from the gradient of the convolution's outputs."""
        dtype = self._multiplied(self.source)
        per_group = self.source.channels // self.groups
        weight_grad = torch.zeros(self.convolved.channels, self.geometry.taps, per_group, dtype=x.dtype)
        run_weight_grad(self.forward_conv, self.source, x.to(dtype), grad.to(dtype), weight_grad)
        return weight_grad

    def _run(self, conv: Filled, source: Rows, x: Tensor, weight: Tensor, output: Rows) -> Tensor:
        y = self.tiles.empty(output, x.dtype)
        if self._multiplied(source) == torch.bfloat16:
            run_conv_bfloat16(conv.having(weight=weight.bfloat16().contiguous()), source, x, y)
        else:
            run_conv(conv.having(weight=weight.contiguous()), x, y)
        return y

    @cached_property
    def child_row(self) -> Int32:
        return np.ascontiguousarray(self.convolved.row[self.children.entry])

    @cached_property
    def child_index(self) -> Tensor:
        """Where each child lies in a dense [C * H * W]."""
        rows = self.convolved
        pixel = rows.order[rows.entry_position].astype(np.int64)
        return torch.from_numpy((rows.channel * np.int64(rows.pixels) + pixel)[self.children.entry])

    @cached_property
    def init(self) -> Tensor | None:
        """What a maximum starts from: zero if a pixel of the window lies outside of the ROI."""
        if self.pool is None or self.pool.average:
            return None
        outside = torch.from_numpy(self.children.missing) > 0
        return torch.where(outside, 0.0, -torch.inf).to(self.dtype)

    def epilogue(self, window: Tensor) -> Filled:
        """Window, ReLU and pooling. `window`: of each child."""
        average = self.pool if self.pool is not None and self.pool.average else None
        maximum = self.pool is not None and not self.pool.average
        return fill_gather(
            self.children,
            child_row=self.child_row,
            pooling=MAX if maximum else SUM,
            factor=1 / (average.kernel[0] * average.kernel[1]) if average else 1.0,
            relu=self.relu,
            scale=window,
            init=self.init,
        )

    def __call__(self, x: Activation, weight: Tensor, bias: Tensor | None, window: Tensor) -> Activation:
        """`weight` [O, C / groups, kH, kW], `bias` [O], `window` [O, H, W]."""
        return Activation(_Stage.apply(x.data, weight, bias, window, self), self.output, self.tiles)


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, stage: Stage) -> Tensor:
        convolved = stage.convolve(x, weight.detach(), None if bias is None else bias.detach())
        weights = window.detach().reshape(-1)[stage.child_index]
        output = stage.tiles.empty(stage.output, x.dtype)
        run_gather(stage.epilogue(weights), convolved, output)
        ctx.save_for_backward(x, weight, convolved, weights)
        ctx.stage, ctx.window_shape = stage, window.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stage: Stage = ctx.stage
        x, weight, convolved, weights = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_window, _ = ctx.needs_input_grad
        grad_convolved = torch.empty_like(convolved)
        sums = torch.empty_like(weights)
        run_gather_backward(stage.epilogue(weights), convolved, grad.contiguous(), grad_convolved, sums)
        grad_x = grad_weight = grad_bias = grad_window = None
        if needs_window:
            grad_window = torch.zeros(ctx.window_shape, dtype=x.dtype)
            grad_window.view(-1)[stage.child_index] = sums
        if needs_bias:
            per_entry = grad_convolved[:, torch.from_numpy(stage.convolved.row).long()].sum(dim=(0, 2))
            channel = torch.from_numpy(stage.convolved.channel).long()
            grad_bias = torch.zeros(len(weight), dtype=x.dtype).index_add_(0, channel, per_entry)
        if needs_weight:
            taps = stage.weight_grad(x, grad_convolved)
            grad_weight = taps.unflatten(1, weight.shape[2:]).permute(0, 3, 1, 2)
        if needs_x:
            grad_x = stage.input_grad(grad_convolved, weight.detach())
        return grad_x, grad_weight, grad_bias, grad_window, None
