"""A network as a list of operations, each on the results of earlier ones: what the engine knows, and calls of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tkn.attention import attention_function, separable_window
from tkn.geometry import Geometry
from tkn.plan.form import ONE_TENSOR, Form
from tkn.plan.nonlinearity import Nonlinearity
from tkn.roi import roi_bounds, roi_mask

#: (channels, height, width) of an activation
Size = tuple[int, int, int]


@dataclass(eq=False)
class Attention:
    """The windows and ROIs of a target layer's kernels: `loc`, `scale`: [2, C]; `function`: its name in ATTENTION."""

    loc: Tensor
    scale: Tensor
    function: str
    scale_unit: float
    clip: bool

    def window(self, size: tuple[int, ...]) -> Tensor:
        """What a map of `size` is multiplied with (Eq. 13): [C, H, W]."""
        return separable_window(size, self.loc, self.scale, attention_function(self.function), self.scale_unit)

    def mask(self, size: tuple[int, ...]) -> Tensor | None:
        """Where a map of `size` is not zero (Eq. 15): bool [C, H, W]; None if it is not clipped."""
        return roi_mask(size, roi_bounds(size, self.loc, self.scale)) if self.clip else None


@dataclass(eq=False)
class Convolve:
    """`weight` [O, C / groups, kH, kW], + `bias` [O], then the attention."""

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    groups: int = 1
    attention: Attention | None = None

    @cached_property
    def window(self) -> Tensor | None:
        """What the map is multiplied with: [O, H, W]."""
        return None if self.attention is None else self.attention.window(self.geometry.output_size)

    @cached_property
    def mask(self) -> Tensor | None:
        """Where the map is not zero: bool [O, H, W]."""
        return None if self.attention is None else self.attention.mask(self.geometry.output_size)


@dataclass(eq=False)
class Affine:
    """x * scale + shift, per channel: [C] in float64."""

    scale: Tensor
    shift: Tensor


@dataclass
class Pooling:
    """The maximum or the mean of each window; `geometry`: of the windows."""

    geometry: Geometry
    average: bool


@dataclass(eq=False)
class ChannelNorm:
    """(x - m) / sqrt(v + eps) * scale + shift, with the mean m and the variance v of a pixel's channels; `scale`,
    `shift`: [C] in float64."""

    scale: Tensor
    shift: Tensor
    eps: float


@dataclass
class Resize:
    """To `output_size` pixels (height, width), each the nearest one, or of the nearest four if it is `bilinear`.

    `factors`: as torch's `scale_factor`, None where the sizes say it; `align_corners`: of bilinear ones.
    """

    output_size: tuple[int, int]
    bilinear: bool
    align_corners: bool = False
    factors: tuple[float | None, float | None] = (None, None)


@dataclass
class AdaptivePooling:
    """The maximum or the mean of windows that make so many pixels (height, width) of any map, perhaps overlapping."""

    output_size: tuple[int, int]
    average: bool


@dataclass
class UnevenMean:
    """The mean of windows of which some have fewer pixels that count, or another divisor.

    `counts_padding`: whether zeros around the map count, as far as it is padded alike; beyond they never do.
    """

    geometry: Geometry
    counts_padding: bool
    divisor: int | None


@dataclass
class Concatenate:
    """Along the channels."""


@dataclass
class Add:
    """The sum of two activations."""


@dataclass
class Multiply:
    """The product of two activations, the second of one size with the first or of one pixel, for all pixels."""


@dataclass(eq=False)
class Select:
    """Of an activation's channels those of these numbers, int64 [C], in their order."""

    channels: Tensor

    @cached_property
    def consecutive(self) -> slice | None:
        """The channels, if each is the next one."""
        first, count = int(self.channels[0]), len(self.channels)
        ascending = torch.arange(first, first + count, device=self.channels.device)
        return slice(first, first + count) if torch.equal(self.channels, ascending) else None


@dataclass
class Same:
    """Nothing: dropout, flattening."""


@dataclass
class Input:
    """One of the network's inputs, such as its images."""


@dataclass(eq=False)
class Constant:
    """A number of the network itself, such as a parameter that its code adds. Left to torch."""

    value: Any
    kind = "constant"


@dataclass(eq=False)
class Call:
    """Left to torch: `function` of arguments in which slots stand for the node's inputs.

    `kind`: what a reader knows it by, a module's class or a function's name; `name`: of the function in VOCABULARY,
    None if it is not there: then no file can hold it. `overwrites`: it writes its result where its first input is.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: str
    name: str | None = None
    overwrites: bool = False


Operation = (
    Convolve
    | Affine
    | Nonlinearity
    | ChannelNorm
    | Pooling
    | UnevenMean
    | AdaptivePooling
    | Resize
    | Concatenate
    | Add
    | Multiply
    | Select
    | Same
    | Input
    | Constant
    | Call
)


@dataclass
class Node:
    """An operation and what it is of.

    `inputs`: positions in the graph, before its own. `size`: of the result as the engine sees it, (features, 1, 1) for
    a vector, or of an unflattened map; None if it isn't a float activation. `flat`: torch sees it as [B, features],
    `line`: as [B, C, L] what the engine sees as a map of one row.
    """

    name: str
    operation: Operation
    inputs: tuple[int, ...]
    size: Size | None
    flat: bool = False
    line: bool = False
    users: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """What torch sees of one image's activation."""
        assert self.size is not None
        channels, height, width = self.size
        if self.flat:
            return (channels * height * width,)
        return (channels, width) if self.line else self.size

    @property
    def by_torch(self) -> bool:
        """Whether only torch can compute it."""
        return isinstance(self.operation, Call | Constant)

    @property
    def kind(self) -> str:
        """What a reader knows it by."""
        operation = self.operation
        if isinstance(operation, Call | Constant):
            return operation.kind
        return operation.function if isinstance(operation, Nonlinearity) else type(operation).__name__


class Graph:
    """Nodes in the order of execution, first the inputs; which of them are outputs; and how they are called."""

    def __init__(self, nodes: list[Node], outputs: Sequence[int], form: Form = ONE_TENSOR) -> None:
        self.nodes, self.outputs, self.form = nodes, tuple(outputs), form
        for node in nodes:
            node.users = []
        for position, node in enumerate(nodes):
            for source in node.inputs:
                nodes[source].users.append(position)

    def with_operations(self, operations: Iterable[Operation]) -> Graph:
        """The same nodes, each with another operation."""
        pairs = zip(self.nodes, operations, strict=True)
        nodes = [replace(node, operation=operation) for node, operation in pairs]
        return Graph(nodes, self.outputs, self.form)

    @cached_property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of each input of one image: (C, H, W), (C, L) or (features,)."""
        return tuple(node.shape for node in self.nodes if isinstance(node.operation, Input))
