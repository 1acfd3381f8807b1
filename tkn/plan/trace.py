"""A network's calls as torch.fx traces them, and what their values are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tkn.layers import RoiLayer
from tkn.plan.form import filled
from tkn.plan.graph import Size

#: A value is seen with batches of these numbers of images; an activation's images are the batch's, its other sides the
#: same in both.
BATCHES = (2, 4)


class _Root(nn.Module):
    """A network that is called with its tensors one after the other; `arguments`: of the network, with slots."""

    def __init__(self, model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, *inputs: Tensor) -> Any:
        args, kwargs = filled(self.arguments, inputs)
        return self.model(*args, **kwargs)


class _Value(fx.Proxy):
    """A value of the network, of which is known where it is."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


class _Input(_Value):
    """One of the network's inputs, of which is known what a plan takes: float32, of so many axes."""

    dtype = torch.float32

    def __init__(self, node: fx.Node, tracer: fx.Tracer, ndim: int) -> None:
        super().__init__(node, tracer)
        self.ndim = ndim

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
    """Goes into the modules that it can trace; those that it can't (`opaque`) are called as a whole. `axes`: how many
    each of the network's inputs has."""

    def __init__(self, opaque: set[nn.Module], axes: Sequence[int]) -> None:
        super().__init__()
        self.opaque, self.axes = opaque, axes
        self.failed: nn.Module | None = None
        self._inputs = 0

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op != "placeholder":
            return _Value(node, self)
        self._inputs += 1
        return _Input(node, self, self.axes[self._inputs - 1])

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """As many inputs as there are, whatever the root's own signature."""
        del is_module, concrete_args
        names = ["x", *(f"x_{index}" for index in range(1, len(self.axes)))]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque or isinstance(m, RoiLayer) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None and m in set(self.root.modules()):  # others are made anew each time
                self.failed = m
            raise


def trace(model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], axes: Sequence[int]) -> fx.GraphModule:
    """The calls that a network makes, of modules that can't be traced as a whole; it is their `model`.

    `arguments`: the network's, with slots for the inputs; `axes`: how many each of these has.
    """
    root = _Root(model, arguments)
    opaque: set[nn.Module] = set()
    while True:
        tracer = _Tracer(opaque, axes)
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


def activation_size(one: Seen, other: Seen, *, lines: bool = False) -> Size | None:
    """The (C, H, W) of a value seen for both `BATCHES`, (features, 1, 1) of a vector; with `lines` (C, 1, L) of
    [B, C, L].

    None if it is no float activation.
    """
    axes = (2, 3, 4) if lines else (2, 4)
    if one.dtype != torch.float32 or other.dtype != torch.float32 or len(one.shape) not in axes or 0 in one.shape:
        return None
    if (one.shape[:1], other.shape[:1]) != (BATCHES[:1], BATCHES[1:]) or one.shape[1:] != other.shape[1:]:
        return None
    channels, *rest = one.shape[1:]
    height, width = (1, *rest) if len(rest) == 1 else rest or (1, 1)
    return channels, height, width


def observe(traced: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[fx.Node, Seen]:
    """What every value is for these inputs."""
    observer = _Observer(traced)
    observer.run(*inputs)
    return observer.seen


class _Observer(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.seen: dict[fx.Node, Seen] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.seen[n] = Seen.of(result)
        return result
