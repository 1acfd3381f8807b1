"""A network's calls as torch.fx traces them, and what their values are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tkn.layers import RoiLayer
from tkn.plan.graph import Size

#: A value is seen with batches of these numbers of images; an activation's images are the batch's, its other sides the
#: same in both.
BATCHES = (3, 5)


class _Root(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class _Value(fx.Proxy):
    """A value of the network, of which is known where it is."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


class _Images(_Value):
    """The network's input, of which is known what a plan takes: float32, [B, C, H, W]."""

    dtype, ndim = torch.float32, 4

    def dim(self) -> int:
        return self.ndim

    @property
    def shape(self) -> tuple[fx.Proxy, ...]:
        return self.size()  # type: ignore[return-value]

    def size(self, dim: int | None = None) -> fx.Proxy | tuple[fx.Proxy, ...]:
        if dim is None:
            return tuple(self.size(axis) for axis in range(self.ndim))  # type: ignore[misc]
        return self.tracer.create_proxy("call_method", "size", (self, dim), {})


class _Tracer(fx.Tracer):
    """Goes into the modules that it can trace; those that it can't (`opaque`) are called as a whole."""

    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: nn.Module | None = None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return (_Images if node.op == "placeholder" else _Value)(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque or isinstance(m, RoiLayer) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None and m in set(self.root.modules()):  # others are made anew each time
                self.failed = m
            raise


def trace(model: nn.Module) -> fx.GraphModule:
    """The calls that a network makes, of modules that can't be traced as a whole; it is their `model`."""
    root = _Root(model)
    opaque: set[nn.Module] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            graph = tracer.trace(root)
        except Exception:
            if tracer.failed is None or tracer.failed in opaque:
                raise
            opaque.add(tracer.failed)
            continue
        for node in reversed(graph.nodes):  # of shapes of which one number was asked
            if node.op == "call_method" and node.target == "size" and not node.users:
                graph.erase_node(node)
        return fx.GraphModule(root, graph)


@dataclass(frozen=True)
class Seen:
    """What a value was for one batch: its type, and of a tensor the type of its numbers and its shape; numbers, and
    tuples of them, themselves."""

    kind: type
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    value: Any = None

    @classmethod
    def of(cls, value: Any) -> Seen:
        if isinstance(value, Tensor):
            return cls(Tensor, value.dtype, tuple(value.shape))
        several = isinstance(value, tuple | list) and all(isinstance(item, int | float) for item in value)
        return cls(type(value), value=value if several or isinstance(value, int | float) else None)


def activation_size(one: Seen, other: Seen) -> tuple[Size | None, bool]:
    """The (C, H, W) of a value seen for both `BATCHES`, (features, 1, 1) if it is flat, and whether it is flat.

    No size if it is no float activation.
    """
    if one.dtype != torch.float32 or other.dtype != torch.float32 or len(one.shape) not in (2, 4) or 0 in one.shape:
        return None, False
    if (one.shape[:1], other.shape[:1]) != (BATCHES[:1], BATCHES[1:]) or one.shape[1:] != other.shape[1:]:
        return None, False
    channels, height, width = (*one.shape[1:], 1, 1)[:3]
    return (channels, height, width), len(one.shape) == 2


def observe(traced: fx.GraphModule, images: Tensor) -> dict[fx.Node, Seen]:
    """What every value is for these images."""
    observer = _Observer(traced)
    observer.run(images)
    return observer.seen


class _Observer(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.seen: dict[fx.Node, Seen] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.seen[n] = Seen.of(result)
        return result
