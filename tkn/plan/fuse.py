"""What a convolution can do as it writes: the normalisation, function and pooling after it; and its known inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from tkn.backends.cpu.rows import Bool, Float
from tkn.backends.cpu.structs import MAX, SUM, MapPoolStruct
from tkn.geometry import Pool, pair
from tkn.plan.graph import Affine, Convolve, Graph, Node, Pooling, Same
from tkn.plan.nonlinearity import Nonlinearity, struct_of


@dataclass(frozen=True, eq=False)
class Fused:
    """A convolution and what follows it: function(scale * sum + shift), pooled.

    `scale`, `shift`: [O, H, W]; `mask`: bool [O, H, W], where it is computed; `before`, `outside`: [O], its value
    elsewhere, before and after the function; `nodes`: the positions of all that it does.
    """

    conv: Convolve
    scale: Float
    shift: Float
    mask: Bool
    before: Float
    outside: Float
    function: Nonlinearity | None
    pool: Pool | None
    nodes: tuple[int, ...]

    @property
    def windows(self) -> tuple[int, int]:
        """The height and width of what is combined to one pixel."""
        return (1, 1) if self.pool is None else pair(self.pool.kernel)

    @property
    def size(self) -> tuple[int, int]:
        """Of the result."""
        size = self.conv.geometry.output_size
        return pair(size if self.pool is None else self.pool.output_size(size))

    @cached_property
    def uniform(self) -> Bool:
        """Which outputs are computed at all pixels, with one scale and shift: [O]."""
        same: Bool = np.logical_and.reduce(self.mask, axis=(1, 2))
        for values in (self.scale, self.shift):
            if values.strides[1:] != (0, 0):  # else one number stands for all
                same = same & np.logical_and.reduce(values == values[:, :1, :1], axis=(1, 2))
        return same


def is_pointwise(conv: Convolve) -> bool:
    """Whether it is a 1x1 convolution without padding or stride."""
    g = conv.geometry
    return g.kernel == (1, 1) and g.stride == (1, 1) and g.before == (0, 0) and g.after == (0, 0)


def constant_inputs(conv: Convolve, mask: Bool, constants: Float) -> Float:
    """What the inputs outside of `mask` [C, H, W], `constants` [C] there, add to every output: [O, H, W], or one number
    of all pixels [O, 1, 1]."""
    if not constants.any() or mask.all():
        return np.zeros((len(conv.weight), 1, 1))
    inputs = (torch.from_numpy(constants)[:, None, None] * torch.from_numpy(~mask))[None]
    (top, left), (bottom, right) = conv.geometry.before, conv.geometry.after
    return F.conv2d(
        F.pad(inputs, (left, right, top, bottom)),
        conv.weight.double(),
        stride=conv.geometry.stride,
        dilation=conv.geometry.dilation,
        groups=conv.groups,
    )[0].numpy()


class Following:
    """The operations after a convolution that it can do as it writes, each the only user of the one before."""

    def __init__(self, graph: Graph, position: int, own: set[int], needed: set[int]) -> None:
        self.graph, self.own, self.needed = graph, own, needed
        self.absorbed = [position]

    def _next(self, kind: type) -> Node | None:
        """The next operation if it is of `kind`, which is then absorbed."""
        ahead: list[int] = []
        position = self.absorbed[-1]
        while position not in self.needed and len(self.graph.nodes[position].users) == 1:
            position = self.graph.nodes[position].users[0]
            if position not in self.own:
                return None
            ahead.append(position)
            node = self.graph.nodes[position]
            if isinstance(node.operation, kind):
                self.absorbed = [*self.absorbed, *ahead]
                return node
            if not isinstance(node.operation, Same):
                return None
        return None

    def average_before(self, conv: Convolve) -> Pooling | None:
        """The mean pooling after a 1x1 convolution, absorbed: to be done first, for a mean of sums is the sum of means,
        and there are fewer of those."""
        absorbed = self.absorbed
        node = self._next(Pooling) if is_pointwise(conv) and conv.window is None else None
        if node is not None:
            operation = node.operation
            assert isinstance(operation, Pooling)
            if operation.average and operation.geometry.before == operation.geometry.after == (0, 0):
                return operation
        self.absorbed = absorbed
        return None

    def fuse(self, conv: Convolve, source_mask: Bool, source_constants: Float) -> Fused:
        """With what can be absorbed. The source is `source_constants` [C] outside of `source_mask` [C, H, W]."""
        shape = (len(conv.weight), *conv.geometry.output_size)
        constant: Float = constant_inputs(conv, source_mask, source_constants)
        if conv.bias is not None:
            constant = constant + conv.bias.double().numpy()[:, None, None]
        mask = np.ones(shape, dtype=bool) if conv.mask is None else conv.mask.numpy()
        scale, before = self._affine(len(conv.weight))
        scale = scale[:, None, None]
        if conv.window is not None:
            scale = scale * conv.window.double().numpy()
        shift = before[:, None, None] + scale * constant
        # Most are the same at all pixels, and then in memory once.
        scale, shift = np.broadcast_to(scale, shape), np.broadcast_to(shift, shape)
        node = self._next(Nonlinearity)
        function = None if node is None else node.operation
        assert function is None or isinstance(function, Nonlinearity)
        outside = before if function is None else function(torch.from_numpy(before)).numpy()
        pool = self._pool()
        return Fused(conv, scale, shift, mask, before, outside, function, pool, tuple(self.absorbed))

    def _affine(self, channels: int) -> tuple[Float, Float]:
        """scale and shift [O]; the shift is what there is outside of the ROIs."""
        scale, shift = np.ones(channels), np.zeros(channels)
        while (node := self._next(Affine)) is not None:
            assert isinstance(node.operation, Affine)
            a, b = node.operation.scale.double().numpy(), node.operation.shift.double().numpy()
            scale, shift = scale * a, shift * a + b
        return scale, shift

    def _pool(self) -> Pool | None:
        absorbed = self.absorbed
        node = self._next(Pooling)
        if node is not None:
            operation = node.operation
            assert isinstance(operation, Pooling)
            g = operation.geometry
            if g.stride == g.kernel and g.before == g.after == (0, 0) and g.dilation == (1, 1):
                return Pool(g.kernel, operation.average)
        self.absorbed = absorbed
        return None


def pool_struct(fused: Fused) -> MapPoolStruct:
    """What becomes of the sums, for kernels of maps."""
    average = fused.pool is not None and fused.pool.average
    factor = 1 / prod(fused.windows) if average else 1.0
    return MapPoolStruct(SUM if average else MAX, struct_of(fused.function), factor)


def single(values: Float) -> NDArray[np.float32]:
    """In float32, as they lie in memory."""
    return np.ascontiguousarray(values, dtype=np.float32)
