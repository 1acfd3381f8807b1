"""One target layer inside its ROIs, with gradients: rows in, rows out.

A stage is a target layer and what follows it: convolution, window, ReLU, pooling. Forward, input gradient, weight
gradient and the window's gradient (and with it those of loc and scale) are all computed inside ROIs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from tkn.backends.cpu.build import kernels
from tkn.backends.cpu.kernels import (
    Tiles,
    fill_conv,
    fill_gather,
    run_conv,
    run_conv_bfloat16,
    run_gather,
    run_gather_backward,
    run_weight_grad,
)
from tkn.backends.cpu.rows import Bool, Children, Int32, Rows, pooled_order
from tkn.backends.cpu.structs import MAX, SUM, Filled, FunctionStruct
from tkn.backends.gradients import Gradients
from tkn.geometry import Geometry, Pool


@dataclass(frozen=True)
class Computed:
    """What a stage made: rows of its output, and for its gradients those of the convolution before the window, and each
    child's window."""

    output: Tensor
    convolved: Tensor
    window: Tensor


@dataclass(frozen=True, eq=False)
class Stage:
    """The lists of one target layer and its ReLU and pooling, for one state of its ROIs.

    `mask`: bool [C, *size], the pixels inside the ROIs. `dtype`: of the rows, the parameters and the sums. `bfloat16`:
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

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
        """Rows of `source` to those of `convolved`. `weight` [O, C / groups, *kernel]."""
        channel = torch.from_numpy(self.convolved.channel)
        conv = self.forward_conv.with_values(shift=None if bias is None else bias.to(x.dtype)[channel])
        # [O, taps, C / groups]: in float32 no copy for weights in channels_last.
        self._run(conv, self.source, x, weight.movedim(1, -1), output)

    def _input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Rows of `source`, from the gradient of the convolution's outputs."""
        by_group = weight.unflatten(0, (self.groups, -1))
        # [C, taps, O / groups]: the roles of inputs and outputs change.
        output = self.tiles.empty(self.source, grad.dtype)
        self._run(self.backward_conv, self.convolved, grad, by_group.movedim(1, -1), output)
        return output

    def _weight_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """[O, taps, C / groups], from rows of the input and from the gradient of the convolution's outputs."""
        dtype = self._multiplied(self.source)
        per_group = self.source.channels // self.groups
        weight_grad = torch.zeros(self.convolved.channels, self.geometry.taps, per_group, dtype=x.dtype, device="cpu")
        run_weight_grad(self.forward_conv, self.source, x.to(dtype), grad.to(dtype), weight_grad)
        return weight_grad

    def _run(self, conv: Filled, source: Rows, x: Tensor, weight: Tensor, output: Tensor) -> None:
        if self._multiplied(source) == torch.bfloat16:
            run_conv_bfloat16(conv.with_values(weight=weight.bfloat16().contiguous()), source, x, output)
        else:
            run_conv(conv.with_values(weight=weight.to(x.dtype).contiguous()), x, output)

    @cached_property
    def child_row(self) -> Int32:
        return np.ascontiguousarray(self.convolved.row[self.children.entry])

    @cached_property
    def child_index(self) -> Tensor:
        """Where each child lies in a dense [C * pixels]."""
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

    def _epilogue(self, window: Tensor) -> Filled:
        """Window, ReLU and pooling. `window`: of each child."""
        average = self.pool if self.pool is not None and self.pool.average else None
        maximum = self.pool is not None and not self.pool.average
        return fill_gather(
            self.children,
            child_row=self.child_row,
            pooling=MAX if maximum else SUM,
            factor=1 / prod(average.kernel) if average else 1.0,
            function=FunctionStruct(int(self.relu)),
            scale=window,
            init=self.init,
        )

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, room: Sequence[Tensor] | None = None
    ) -> Computed:
        """Rows of `source` -> rows of `output`. `weight` [O, C / groups, *kernel], `bias` [O], `window` [O, *size].

        `room`: where to put the results, of `room_shapes`; by default new tensors.
        """
        if room is None:
            room = [torch.empty(shape, dtype=x.dtype, device="cpu") for shape in self.room_shapes()]
        output, convolved, weights = room
        self._convolve(x, weight, bias, convolved)
        torch.index_select(window.reshape(-1), 0, self.child_index, out=weights)
        run_gather(self._epilogue(weights), convolved, output)
        return Computed(output, convolved, weights)

    def room_shapes(self) -> list[tuple[int, ...]]:
        """Of the tensors that `forward` fills: output, convolved, window."""
        return [
            self.tiles.shape(self.output),
            self.tiles.shape(self.convolved),
            (len(self.children.entry),),
        ]

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, computed: Computed, needs: tuple[bool, bool, bool, bool]
    ) -> Gradients:
        """From the gradient of the output's rows. `needs`: whether x, weight, bias and window need theirs."""
        needs_x, needs_weight, needs_bias, needs_window = needs
        grad_convolved = torch.empty_like(computed.convolved)
        sums = torch.empty_like(computed.window)
        run_gather_backward(self._epilogue(computed.window), computed.convolved, grad, grad_convolved, sums)
        grad_x = grad_weight = grad_bias = grad_window = None
        if needs_window:
            grad_window = torch.zeros(self.convolved.mask.shape, dtype=x.dtype, device="cpu")
            grad_window.view(-1)[self.child_index] = sums
        if needs_bias:
            per_entry = grad_convolved[:, torch.from_numpy(self.convolved.row).long()].sum(dim=(0, 2))
            channel = torch.from_numpy(self.convolved.channel).long()
            grad_bias = torch.zeros(len(weight), dtype=x.dtype, device="cpu").index_add_(0, channel, per_entry)
        if needs_weight:
            taps = self._weight_grad(x, grad_convolved)
            grad_weight = taps.unflatten(1, weight.shape[2:]).movedim(-1, 1)
        if needs_x:
            grad_x = self._input_grad(grad_convolved, weight)
        return Gradients(grad_x, grad_weight, grad_bias, grad_window)

    def nbytes(self) -> int:
        """What the lists take: those of the forward pass, and as much for the backward pass's, made when it comes."""
        assert self.forward_conv.struct
        return 2 * sum(_bytes_of(value) for value in vars(self).values())


def _bytes_of(value: object) -> int:
    if isinstance(value, Tensor | np.ndarray):
        return value.nbytes
    if isinstance(value, Filled):
        return sum(_bytes_of(kept) for kept in value.kept.values())
    if isinstance(value, Rows | Children):
        # The whole rows and their tables of an input that every layer of its size shares count for each.
        return sum(_bytes_of(kept) for kept in vars(value).values() if not isinstance(kept, Rows))
    return 0
