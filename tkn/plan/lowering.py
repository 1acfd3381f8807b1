"""What both arrangements share in lowering a graph: the walk over its nodes, and operations put off until needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

import numpy as np
import torch

from tkn.backends.cpu.rows import Float, Int32
from tkn.plan.graph import (
    AdaptivePooling,
    Affine,
    ChannelNorm,
    Concatenate,
    Convolve,
    Graph,
    Multiply,
    Pooling,
    Resize,
    Same,
    Select,
    UnevenMean,
)
from tkn.plan.nonlinearity import Nonlinearity
from tkn.plan.resampling import Axis, axes


@dataclass(frozen=True, eq=False, kw_only=True)
class Pending:
    """An activation function(scale * x + shift) per channel, of which only x is in memory; and x where it is not.

    `outside`, `scale`, `shift`: [C].
    """

    outside: Float
    scale: Float | None = None
    shift: Float | None = None
    function: Nonlinearity | None = None

    @property
    def pending(self) -> bool:
        return self.function is not None or self.scale is not None

    def constants(self) -> Float:
        """What the activation is where x is not in memory."""
        value = self.outside if self.scale is None else self.outside * self.scale + self.shift
        return value if self.function is None else self.function(torch.from_numpy(value)).numpy()

    def scaled(self, operation: Affine) -> Self:
        """With an affine operation more; not after a function."""
        assert self.function is None
        scale, shift = operation.scale.double().numpy(), operation.shift.double().numpy()
        if self.scale is not None:
            assert self.shift is not None
            scale, shift = self.scale * scale, self.shift * scale + shift
        return replace(self, scale=scale, shift=shift)

    def of_channels(self, channels: Int32) -> Self:
        """With the numbers here of these channels: the rest is to be replaced."""
        scale, shift = (None if one is None else one[channels] for one in (self.scale, self.shift))
        return replace(self, outside=self.outside[channels], scale=scale, shift=shift)


def normalised(norm: ChannelNorm, channels: Float) -> Float:
    """Of one pixel's channels [C]."""
    deviation = np.sqrt(channels.var() + norm.eps)
    return (channels - channels.mean()) / deviation * norm.scale.cpu().numpy() + norm.shift.cpu().numpy()


V = TypeVar("V", bound=Pending)


class Lowering(ABC, Generic[V]):
    """Lowers the nodes of one part of a graph that runs without torch.

    `inputs`: nodes whose dense activations come from outside; `outputs`: those needed outside.
    """

    values: dict[int, V]

    def __init__(self, graph: Graph, nodes: list[int], inputs: list[int], outputs: list[int]) -> None:
        self.graph, self.nodes, self.inputs, self.outputs = graph, nodes, inputs, outputs
        self.own = set(nodes)

    def _walk(self) -> None:
        """Lower everything once."""
        self.values = {}
        for position in self.inputs:
            self._pack(position)
        for position in self.nodes:
            if position not in self.values:
                self._lower(position)
        for dense, position in enumerate(self.outputs):
            self._unpack(position, len(self.inputs) + dense)
        self.values.clear()  # the lists of where everything lies are long

    def _lower(self, position: int) -> None:
        node = self.graph.nodes[position]
        sources = [self.values[source] for source in node.inputs]
        value, operation = sources[0], node.operation
        if isinstance(operation, Convolve):
            self._convolution(position, operation, value)
            return
        if isinstance(operation, Nonlinearity):
            value = self._materialised(value) if value.function else value
            value = replace(value, function=operation)
        elif isinstance(operation, Affine):
            value = (self._materialised(value) if value.function else value).scaled(operation)
        elif isinstance(operation, Pooling):
            value = self._gather([value], operation)
        elif isinstance(operation, UnevenMean | AdaptivePooling | Resize):
            maximum = isinstance(operation, AdaptivePooling) and not operation.average
            size = self.graph.nodes[node.inputs[0]].size
            assert size is not None
            value = self._resampled(value, *axes(operation, size[1:]), maximum=maximum)
        elif isinstance(operation, ChannelNorm):
            value = self._normalised(self._materialised(value) if value.pending else value, operation)
        elif isinstance(operation, Concatenate):
            value = self._concatenated([self._materialised(part) if part.pending else part for part in sources])
        elif isinstance(operation, Select):
            value = self._selected(value, operation.channels.cpu().numpy())
        elif isinstance(operation, Multiply):
            value = self._product(*(self._materialised(source) for source in sources))
        elif not isinstance(operation, Same):  # Add
            value = self._gather(sources, None)
        self.values[position] = value

    @abstractmethod
    def _pack(self, position: int) -> None:
        """Bring in a dense activation."""

    @abstractmethod
    def _unpack(self, position: int, dense: int) -> None:
        """Give out an activation as the dense one of that number."""

    @abstractmethod
    def _materialised(self, value: V) -> V:
        """The same activation in a place of its own, nothing pending."""

    @abstractmethod
    def _gather(self, sources: list[V], pooling: Pooling | None) -> V:
        """The sum of the sources, or a pooling of one."""

    @abstractmethod
    def _product(self, value: V, factor: V) -> V:
        """Of activations in places of their own; the factor may be of one pixel."""

    @abstractmethod
    def _concatenated(self, parts: list[V]) -> V:
        """The channels of all parts, of which nothing is pending."""

    def _resampled(self, value: V, lines: Axis, columns: Axis, *, maximum: bool) -> V:  # noqa: ARG002
        """Weighted sums of windows, or their maximum, with weights of lines and of columns."""
        raise AssertionError("it is torch's here")

    def _normalised(self, value: V, norm: ChannelNorm) -> V:  # noqa: ARG002
        """Of what is not pending: each pixel by the mean and the deviation of its channels."""
        raise AssertionError("it is torch's here")

    @abstractmethod
    def _selected(self, value: V, channels: Int32) -> V:
        """Some of its channels, which stay where they are."""

    @abstractmethod
    def _convolution(self, position: int, conv: Convolve, value: V) -> None:
        """A convolution, with what follows it and can be done as it writes."""
