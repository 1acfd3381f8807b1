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

from tkn.engine.kernels import (
    Tiles,
    fill_conv,
    fill_gather,
    pack,
    run_conv,
    run_gather,
    run_gather_backward,
    run_weight_grad,
    unpack,
)
from tkn.engine.rows import Bool, Children, Geometry, Int32, Pool, Rows, pooled_order
from tkn.engine.structs import MAX, SUM, Filled


@dataclass(frozen=True)
class Activation:
    """An activation of a batch as rows [tiles, rows, lanes]."""

    data: Tensor
    rows: Rows
    tiles: Tiles

    @classmethod
    def pack(cls, x: Tensor) -> Activation:
        """All of [B, C, H, W]."""
        tiles = Tiles.of(len(x), x.dtype)
        rows = Rows.full(x.shape[1], (x.shape[2], x.shape[3]))
        return cls(_Pack.apply(x, rows, tiles), rows, tiles)

    def unpack(self, *, channels_last: bool = False) -> Tensor:
        """[B, C, H, W], zero where there is no row."""
        return _Unpack.apply(self.data, self.rows, self.tiles, channels_last)


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

    `mask`: bool [C, H, W], the pixels inside the ROIs.
    """

    source: Rows
    mask: Bool
    geometry: Geometry
    groups: int
    relu: bool
    pool: Pool | None
    tiles: Tiles
    dtype: torch.dtype

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
        return fill_conv(self.source, self.convolved, self.geometry, self.groups, self.tiles.lanes, self.dtype)

    @cached_property
    def backward_conv(self) -> Filled:
        return fill_conv(
            self.convolved, self.source, self.geometry, self.groups, self.tiles.lanes, self.dtype, transposed=True
        )

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
        rows = stage.convolved
        # [O, taps, C]: no copy for weights in channels_last.
        taps = weight.detach().permute(0, 2, 3, 1).contiguous()
        channel = torch.from_numpy(rows.channel)
        conv = stage.forward_conv.having(weight=taps, shift=None if bias is None else bias.detach()[channel])
        convolved = stage.tiles.empty(rows, x.dtype)
        run_conv(conv, x, convolved)
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
            outputs, channels, height, width = weight.shape
            taps = torch.zeros(outputs, height * width, channels, dtype=x.dtype)
            run_weight_grad(stage.forward_conv, stage.source, x, grad_convolved, taps)
            grad_weight = taps.view(outputs, height, width, channels).permute(0, 3, 1, 2)
        if needs_x:
            # [C, taps, O] of each group: the roles of inputs and outputs change.
            outputs, channels = len(weight), weight.shape[1]
            by_group = weight.detach().reshape(stage.groups, outputs // stage.groups, channels, -1)
            conv = stage.backward_conv.having(weight=by_group.permute(0, 2, 3, 1).contiguous())
            grad_x = torch.empty_like(x)
            run_conv(conv, grad_convolved, grad_x)
        return grad_x, grad_weight, grad_bias, grad_window, None
