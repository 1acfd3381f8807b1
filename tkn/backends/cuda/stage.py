"""One target layer inside its ROIs on a GPU, with gradients: rows in, rows out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tkn.backends.cuda.lists import Lists
from tkn.backends.cuda.pooling import Children, pool, pool_gradient
from tkn.backends.cuda.product import Epilogue, multiply, pack, weight_gradient
from tkn.backends.cuda.rows import Rows
from tkn.backends.gradients import Gradients
from tkn.geometry import Geometry, Pool
from tkn.roi import roi_bounds, roi_mask
from tkn.spec import Target


@dataclass(frozen=True)
class Computed:
    """What a stage made: rows of its output, and for its gradients those of the convolution, with the bias, before the
    window; which child of a pooling each output came from; and the window of each row."""

    output: Tensor
    convolved: Tensor
    kept: Tensor
    window: Tensor


@dataclass(frozen=True, eq=False)
class Stage:
    """The lists of a target layer and what is joined to it, for ROIs within `bounds`: int64 [O, 2, 2], (lo, hi) last.

    The window, zero outside the present ROIs, makes the results exact where `bounds` are larger than these.
    """

    source: Rows
    bounds: Tensor
    geometry: Geometry
    groups: int
    relu: bool
    pool: Pool | None
    #: Place for so many times the rows and lists that there are.
    headroom: float = 1.0
    #: Makes all of the same sizes.
    like: Stage | None = None

    @cached_property
    def mask(self) -> Tensor:
        """The numbers of the convolution that are computed: in bounds, and read by the pooling: bool [O, H, W]."""
        mask = roi_mask(self.geometry.output_size, self.bounds)
        if self.pool is not None:
            rows, columns = self.pool.output_size(self.geometry.output_size)
            mask[:, rows * self.pool.kernel[0] :] = False
            mask[:, :, columns * self.pool.kernel[1] :] = False
        return mask

    @cached_property
    def convolved(self) -> Rows:
        capacity = None if self.like is None else self.like.convolved.capacity
        return Rows.of(self.mask, headroom=self.headroom, capacity=capacity)

    @cached_property
    def children(self) -> Children:
        capacity = None if self.like is None else self.like.output.capacity
        return Children.of(self.convolved, self.mask, self.pool, headroom=self.headroom, capacity=capacity)

    @property
    def output(self) -> Rows:
        return self.children.output

    @cached_property
    def lists(self) -> Lists:
        like = None if self.like is None else self.like.lists
        return Lists.of(self.source, self.convolved, self.geometry, headroom=self.headroom, like=like)

    @cached_property
    def reversed_lists(self) -> Lists:
        """Of the gradient of the inputs."""
        like = None if self.like is None else self.like.reversed_lists
        return Lists.of(self.convolved, self.source, self.geometry, flip=True, headroom=self.headroom, like=like)

    @cached_property
    def corners(self) -> Tensor:
        """The bounds as kernels take them."""
        return self.bounds.int().contiguous()

    @cached_property
    def place(self) -> Tensor:
        """Where each of the convolution's rows lies in a dense [O * H * W]: int64 [capacity]; past it if unused."""
        return self.convolved.places()

    def prepare(self, *, gradients: bool) -> None:
        """Make now what would be made when it is first used, perhaps while a graph is captured; with lists for
        `gradients` or without."""
        for name in ("lists", "place", "corners", *(["reversed_lists"] if gradients else [])):
            getattr(self, name)
        if self.bounds.is_cuda:
            # They may be read on another stream than the one that they are made on.
            torch.cuda.current_stream(self.bounds.device).synchronize()

    def window_of_rows(self, window: Tensor) -> Tensor:
        """Of a dense window [O, H, W]: that of each row, and zero: float32 [capacity + 1]."""
        dense = torch.nn.functional.pad(window.float().flatten(), (0, 1))
        return torch.nn.functional.pad(dense[self.place], (0, 1))

    def shift_of_rows(self, bias: Tensor) -> Tensor:
        """Of the bias [O] that of each row: float32 [capacity]."""
        return bias.float()[self.convolved.channel.long()]

    def inside(self, target: Target) -> Tensor:
        """The pixels inside the present ROIs: bool [O, H, W]."""
        size = self.geometry.output_size
        return roi_mask(size, roi_bounds(size, target.loc, target.scale))

    def infer(self, x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, *, tf32: bool) -> Tensor:
        """As `forward`, without what gradients need."""
        packed = pack(weight, self.lists, self.groups, x.dtype)
        shift = None if bias is None else self.shift_of_rows(bias)
        if self.pool is None:
            weighed = Epilogue(window, None if shift is None else shift * window[:-1], self.relu)
            return multiply(x, packed, self.lists, weighed, tf32=tf32)
        z = multiply(x, packed, self.lists, Epilogue(shift=shift), tf32=tf32)
        return pool(z, window, self.children, relu=self.relu, average=self.pool.average, keep=False)[0]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, *, tf32: bool) -> Computed:
        """Rows of `source` -> rows of `output`. `weight` [O, C / groups, kH, kW], `bias` [O], `window` of rows."""
        packed = pack(weight, self.lists, self.groups, x.dtype)
        shift = None if bias is None else self.shift_of_rows(bias)
        z = multiply(x, packed, self.lists, Epilogue(shift=shift), tf32=tf32)
        y, kept = pool(z, window, self.children, relu=self.relu, average=self.averages, keep=not self.averages)
        return Computed(y, z, kept, window)

    @property
    def averages(self) -> bool:
        """Whether it ends in a mean pooling."""
        return self.pool is not None and self.pool.average

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        computed: Computed,
        needs: tuple[bool, bool, bool, bool],
        *,
        tf32: bool,
    ) -> Gradients:
        """From the gradient of the output's rows. `needs`: whether x, weight, bias and window need theirs."""
        needs_x, needs_weight, needs_bias, needs_window = needs
        of_z, of_window, sums = pool_gradient(
            grad,
            computed.convolved,
            computed.window,
            computed.kept,
            self.children,
            relu=self.relu,
            average=self.averages,
        )
        grad_x = grad_weight = grad_bias = grad_window = None
        if needs_window:
            grad_window = self._dense(of_window)
        if needs_bias:
            grad_bias = self._dense(sums).sum(dim=(1, 2))
        if needs_weight:
            grad_weight = weight_gradient(of_z, x, self.lists, self.corners, weight.shape, self.groups, tf32=tf32)
        if needs_x:
            packed = pack(weight, self.reversed_lists, self.groups, x.dtype)
            grad_x = multiply(of_z, packed, self.reversed_lists, Epilogue(), tf32=tf32)
        return Gradients(grad_x, grad_weight, grad_bias, grad_window)

    def _dense(self, of_rows: Tensor) -> Tensor:
        """A number of each of the convolution's rows [capacity + 1] as a map [O, H, W], zero elsewhere."""
        rows = self.convolved
        return of_rows[rows.row.long()].view(rows.channels, *rows.size)

    def refill(self, bounds: Tensor) -> None:
        """Make the lists of other bounds in the place of these, in the same tensors: what was captured reads on there.
        `Outgrown` if they do not fit; then these are good for nothing more."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        made = Stage(**{**fields, "bounds": bounds, "like": self})
        for mine, new in zip(self._tensors(), made._tensors(like=self), strict=True):
            mine.copy_(new)

    def _tensors(self, like: Stage | None = None) -> list[Tensor]:
        """All that depends on the bounds, as far as it was made; or as far as `like` has it."""
        made = vars(self if like is None else like)
        tensors = [self.bounds, self.mask, *self.convolved.tensors(), self.children.child]
        if self.pool is not None:
            tensors += self.output.tensors()
        for name in ("lists", "reversed_lists"):
            tensors += getattr(self, name).tensors() if name in made else ()
        return tensors + [getattr(self, name) for name in ("corners", "place") if name in made]

    def nbytes(self) -> int:
        """What the lists take on the device: those of the forward pass, and as much for the backward pass's."""
        lists = sum(tensor.nbytes for tensor in self.lists.tensors())
        return lists + sum(tensor.nbytes for tensor in self._tensors())
