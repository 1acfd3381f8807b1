"""From a network to its graph: traced, and run once to see what its values are."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tkn.geometry import Geometry, pair
from tkn.layers import RoiLayer, TargetConv2d
from tkn.ops.target import conv_geometry
from tkn.plan.graph import (
    Add,
    Affine,
    Concatenate,
    Convolve,
    Graph,
    Input,
    Method,
    Node,
    Operation,
    Pooling,
    Relu,
    Same,
    Size,
    Slot,
    Torch,
)
from tkn.roi import roi_mask
from tkn.sequential import TargetSequential


class _Root(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Goes into the modules that it can trace; those that it can't (`opaque`) are called as a whole."""

    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque or isinstance(m, RoiLayer) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if isinstance(m, TargetSequential):
            forward = partial(nn.Sequential.forward, m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = m
            raise


def _trace(model: nn.Module) -> fx.GraphModule:
    root = _Root(model)
    opaque: set[nn.Module] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            return fx.GraphModule(root, tracer.trace(root))
        except Exception:
            if tracer.failed is None or tracer.failed in opaque:
                raise
            opaque.add(tracer.failed)


def frozen(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without gradients, whose target layers are torch's."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, TargetConv2d):
            module.engine = "dense"
    return model


def build_graph(model: nn.Module, input_size: tuple[int, ...]) -> Graph:
    """The operations of a `frozen` model for images of `input_size`; it shares the model's parameters."""
    return _Builder(_trace(model)).run(input_size)


class _Builder(fx.Interpreter):
    """Runs the traced network once on two images, noting an operation for every call."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.nodes: list[Node] = []
        self.position: dict[fx.Node, int] = {}

    def run(self, input_size: tuple[int, ...]) -> Graph:  # type: ignore[override]
        parameter = next(self.module.parameters(), torch.zeros(()))
        with torch.no_grad():
            super().run(torch.zeros(2, *input_size, dtype=parameter.dtype))
        output = self.position[self._output]
        for position, node in enumerate(self.nodes):
            for source in node.inputs:
                self.nodes[source].users.append(position)
        return Graph(self.nodes, output)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "output":
            if not isinstance(n.args[0], fx.Node) or not isinstance(result, Tensor):
                raise ValueError("accelerate takes networks that return one tensor")
            self._output = n.args[0]
        elif n.op == "get_attr":
            self._add(n, _constant(result), (), result)
        elif n.op == "placeholder":
            self._add(n, Input(), (), result)
        else:
            self._add(n, *self._known(n, result), result)
        return result

    def _add(self, n: fx.Node, operation: Operation, inputs: tuple[fx.Node, ...], result: Any) -> None:
        positions = tuple(self.position[source] for source in inputs)
        size, flat = _size(result)
        if flat and isinstance(operation, Same | Relu | Affine | Add | Concatenate):
            size = self._map_size(operation, positions)  # flattening keeps the map
        name = str(n.target).removeprefix("model.") if n.op == "call_module" else n.name
        self.position[n] = len(self.nodes)
        self.nodes.append(Node(name, operation, positions, size, flat))

    def _map_size(self, operation: Operation, positions: tuple[int, ...]) -> Size:
        sizes = [size for position in positions if (size := self.nodes[position].size) is not None]
        channels = sum(size[0] for size in sizes) if isinstance(operation, Concatenate) else sizes[0][0]
        return channels, *sizes[0][1:]

    def _known(self, n: fx.Node, result: Any) -> tuple[Operation, tuple[fx.Node, ...]]:
        sources = tuple(n.all_input_nodes)
        if _size(result)[0] is not None and all(self._activation(s) for s in sources):
            if n.op == "call_module" and len(sources) == 1 and not n.kwargs and n.args == sources:
                module = self.module.get_submodule(str(n.target))
                operation = _module_operation(module, self.nodes[self.position[sources[0]]], result)
            else:
                operation = _function_operation(n)
            if isinstance(operation, Add | Concatenate) and not self._aligned(operation, sources):
                operation = None
            if operation is not None:
                return operation, tuple(n.args[0]) if isinstance(operation, Concatenate) else sources  # type: ignore
        return self._torch(n), sources

    def _aligned(self, operation: Add | Concatenate, sources: tuple[fx.Node, ...]) -> bool:
        """Whether the maps have one size, and for a sum as many channels: torch would also stretch some of them."""
        sizes = {self.nodes[self.position[source]].size for source in sources}
        if isinstance(operation, Add):
            return len(sizes) == 1
        return len({size[1:] for size in sizes if size is not None}) == 1

    def _activation(self, n: fx.Node) -> bool:
        return self.nodes[self.position[n]].size is not None

    def _torch(self, n: fx.Node) -> Torch:
        slots: dict[fx.Node, Any] = {source: Slot(index) for index, source in enumerate(n.all_input_nodes)}
        args: Any = fx.map_arg(n.args, slots.__getitem__)
        kwargs: Any = fx.map_arg(n.kwargs, slots.__getitem__)
        if n.op == "call_module":
            module = self.module.get_submodule(str(n.target))
            return Torch(module, args, kwargs, type(module).__name__)
        if n.op == "call_method":
            return Torch(Method(str(n.target)), args, kwargs, str(n.target))
        return Torch(n.target, args, kwargs, getattr(n.target, "__name__", str(n.target)))  # type: ignore[arg-type]


def _constant(value: Any) -> Torch:
    return Torch(partial(_identity, value), (), {}, "constant")


def _identity(value: Any) -> Any:
    return value


def _size(result: Any) -> tuple[Size | None, bool]:
    if isinstance(result, Tensor) and result.dtype == torch.float32 and result.dim() in (2, 4) and len(result) == 2:
        channels, height, width = (*result.shape[1:], 1, 1)[:3]
        return (channels, height, width), result.dim() == 2
    return None, False


def _module_operation(module: nn.Module, source: Node, result: Tensor) -> Operation | None:
    assert source.size is not None
    if type(module) in (nn.Conv2d, TargetConv2d) and not source.flat:
        assert isinstance(module, nn.Conv2d)
        return _convolution(module, source.size)
    if type(module) is nn.Linear and source.flat:
        channels, height, width = source.size
        weight = module.weight.reshape(-1, channels, height, width)
        return Convolve(weight, module.bias, Geometry((height, width), (height, width)))
    if type(module) in (nn.BatchNorm2d, nn.BatchNorm1d) and (not source.flat or source.size[1:] == (1, 1)):
        return _batch_norm(module)
    if type(module) is nn.ReLU:
        return Relu()
    if type(module) in (nn.Dropout, nn.Dropout2d, nn.Identity):
        return Same()
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) in ((1, -1), (1, 3)):
        return Same()
    if type(module) in (nn.MaxPool2d, nn.AvgPool2d) and not source.flat:
        return _pooling(module, source.size)
    if type(module) is nn.AdaptiveAvgPool2d and result.shape[2:] == (1, 1) and not source.flat:
        return Pooling(Geometry(source.size[1:], source.size[1:]), average=True)
    return None


def _function_operation(n: fx.Node) -> Operation | None:
    if n.target in (torch.relu, F.relu, "relu") and len(n.args) == 1 and not n.kwargs.get("inplace"):
        return Relu()
    if n.target is torch.cat and (n.args[1:] == (1,) or (len(n.args) == 1 and n.kwargs == {"dim": 1})):
        return Concatenate()
    if n.target in (torch.flatten, "flatten") and n.args[1:] == (1,) and not n.kwargs:
        return Same()
    sums = (operator.add, operator.iadd, torch.add)
    if n.target in sums and len(n.args) == 2 and len(n.all_input_nodes) == 2 and not n.kwargs:
        return Add()
    return None


def _convolution(module: nn.Conv2d, size: Size) -> Operation | None:
    if module.padding_mode != "zeros":
        return None
    geometry = conv_geometry(module, size[1:])
    window = mask = None
    if isinstance(module, TargetConv2d):
        window = module.window(geometry.output_size)
        if module.clip:
            mask = roi_mask(geometry.output_size, module.rois(geometry.output_size))
    return Convolve(module.weight, module.bias, geometry, module.groups, window, mask)


def _batch_norm(module: Any) -> Operation | None:
    if module.running_mean is None:
        return None
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.double()
    shift = -module.running_mean.double() * scale
    return Affine(scale, shift if module.bias is None else shift + module.bias.double())


def _pooling(module: Any, size: Size) -> Operation | None:
    kernel, stride, padding = pair(module.kernel_size), pair(module.stride), pair(module.padding)
    average = isinstance(module, nn.AvgPool2d)
    if average:
        unusual = module.divisor_override is not None or (padding != (0, 0) and not module.count_include_pad)
    else:
        unusual = module.return_indices
    if module.ceil_mode or unusual:
        return None
    dilation = (1, 1) if average else pair(module.dilation)
    return Pooling(Geometry(size[1:], kernel, stride, padding, padding, dilation), average)
