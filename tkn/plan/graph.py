"""A network as a short list of operations that the engine knows, and of what it leaves to torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tkn.geometry import Geometry

Size = tuple[int, int, int]


@dataclass
class Convolve:
    """`weight` [O, C / groups, kH, kW], + `bias` [O], * `window` [O, H, W]; zero outside `mask`, bool [O, H, W]."""

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    groups: int = 1
    window: Tensor | None = None
    mask: Tensor | None = None


@dataclass
class Affine:
    """x * scale + shift, per channel."""

    scale: Tensor
    shift: Tensor


@dataclass
class Relu:
    """max(x, 0)"""


@dataclass
class Pooling:
    """The maximum or the mean of each window; `geometry`: of the windows."""

    geometry: Geometry
    average: bool


@dataclass
class Concatenate:
    """Along the channels."""


@dataclass
class Add:
    """The sum of two activations."""


@dataclass
class Same:
    """Nothing: dropout, flattening."""


@dataclass
class Input:
    """The network's input."""


@dataclass
class Torch:
    """Left to torch. `arguments`: with integers n in place of the n-th input's tensor wrapped in `Slot`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: str


@dataclass(frozen=True)
class Slot:
    """The place of a node's n-th input among a call's arguments."""

    index: int


@dataclass(frozen=True)
class Method:
    """Calls the method `name` of its first argument."""

    name: str

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(target, self.name)(*args, **kwargs)


Operation = Convolve | Affine | Relu | Pooling | Concatenate | Add | Same | Input | Torch


@dataclass
class Node:
    """`inputs`: positions in the graph. `size`: (C, H, W) of the result as the engine sees it, (features, 1, 1) for a
    vector, or of an unflattened map; None if it isn't a float activation. `flat`: torch sees it as [B, features]."""

    name: str
    operation: Operation
    inputs: tuple[int, ...]
    size: Size | None
    flat: bool = False
    users: list[int] = field(default_factory=list)


@dataclass
class Graph:
    """Nodes in the order of execution, the first the input, and which of them is the output."""

    nodes: list[Node]
    output: int

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What is left to torch: "name (type)"."""
        return tuple(f"{node.name} ({node.operation.kind})" for node in self.nodes if isinstance(node.operation, Torch))
