"""From a network to its graph: each of its traced calls as an operation."""

from __future__ import annotations

import copy
import operator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tkn.app.messages import first_line
from tkn.geometry import Geometry, pair
from tkn.layers import TargetConv1d, TargetConv2d, TargetConv3d
from tkn.plan.compare import random_inputs
from tkn.plan.form import Form, Slot, called_with, slotted
from tkn.plan.graph import (
    Add,
    Affine,
    Attention,
    Call,
    Concatenate,
    Constant,
    Convolve,
    Graph,
    Input,
    Multiply,
    Node,
    Operation,
    Pooling,
    Same,
    Size,
)
from tkn.plan.lines import drops_length, is_convolution_of, pooling_of, whole_rows
from tkn.plan.modules import as_function
from tkn.plan.nonlinearity import Nonlinearity, call_nonlinearity, module_nonlinearity
from tkn.plan.trace import BATCHES, Seen, activation_size, observe, trace
from tkn.plan.vocabulary import Attribute, Method, function_name, method_name, original
from tkn.roi import roi_bounds


def frozen(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without gradients, whose target layers are torch's."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, TargetConv1d | TargetConv2d | TargetConv3d):
            module.engine = "dense"
    return model


@torch.no_grad()
def build_graph(model: nn.Module, input_size: Any) -> Graph:
    """The operations of a `frozen` model for inputs of a size, or of several (`called_with`); it shares the model's
    parameters.

    ValueError if it fails on inputs [B, C, L], which may have been meant as one image of two dimensions.
    """
    arguments, shapes = called_with(input_size)
    traced = trace(model, arguments, [1 + len(shape) for shape in shapes])
    lines = any(len(shape) == 2 for shape in shapes)
    try:
        seen = [observe(traced, random_inputs(batch, shapes)) for batch in BATCHES]
    except (RuntimeError, ValueError) as error:  # torch's modules raise both
        if all(len(shape) == 3 for shape in shapes):
            raise
        images = " and ".join(f"[B, {', '.join(map(str, shape))}]" for shape in shapes)
        cause = first_line(error)
        raise ValueError(f"{type(model).__name__} takes no images {images}: {cause}") from error
    return _Builder(traced, seen[0], seen[1], lines=lines).graph(arguments)


#: What has memory of its own in torch too.
_OWN_MEMORY = (Convolve, Affine, Add, Multiply, Concatenate, Pooling, Nonlinearity)


class _Builder:
    """Makes nodes of the traced calls; `one`, `other`: what was seen in runs on batches of the two sizes; `lines`: the
    network's images are [B, C, L], and other such values are activations too."""

    def __init__(
        self, traced: fx.GraphModule, one: dict[fx.Node, Seen], other: dict[fx.Node, Seen], *, lines: bool
    ) -> None:
        self.traced, self.one, self.other, self.lines = traced, one, other, lines
        self.nodes: list[Node] = []
        self.position: dict[fx.Node, int] = {}

    def graph(self, arguments: Any) -> Graph:
        """`arguments`: of the network, with slots for its inputs."""
        outputs: list[fx.Node] = []
        for n in self.traced.graph.nodes:
            if n.op == "output":
                result = n.args[0]
                if isinstance(result, fx.Node) and _is_named_tuple(result):
                    result = result.target(*result.args)  # type: ignore[operator]
                form = Form(arguments, slotted(result, lambda value: isinstance(value, fx.Node), outputs))
            elif _is_named_tuple(n) and [user.args for user in n.users] == [(n,)]:
                continue  # the network's result
            elif n.op == "placeholder":
                self._add(n, Input(), ())
            elif n.op == "get_attr":
                self._add(n, Constant(operator.attrgetter(n.target)(self.traced)), ())
            else:
                self._add(n, *self._operation(n))
                module = self.traced.get_submodule(str(n.target)) if n.op == "call_module" else None
                if len(n.all_input_nodes) == 1 and _overwrites(n, module):
                    self._redirect(n)
        for output in outputs:
            if self.one[output].kind is not Tensor:
                raise ValueError(
                    f"accelerate takes networks that return tensors, alone or in lists, tuples and dictionaries: "
                    f"{self._name(output)} is a {self.one[output].kind.__name__}"
                )
        if not outputs:
            raise ValueError("accelerate takes networks that return tensors: this one returns none that it computes")
        return Graph(self.nodes, [self.position[output] for output in outputs], form)

    def _redirect(self, n: fx.Node) -> None:
        """Let later readers of what n overwrites read its result, unless torch does write there."""
        if not isinstance(self.nodes[self.position[n]].operation, Call):
            self.position[n.all_input_nodes[0]] = self.position[n]

    def _add(self, n: fx.Node, operation: Operation, inputs: tuple[int, ...]) -> None:
        size, axes = self._activation(n), len(self.one[n].shape)
        if (
            size is not None
            and axes == 2
            and isinstance(operation, Same | Nonlinearity | Affine | Add | Multiply | Concatenate)
        ):
            size = self._map_size(operation, inputs)  # flattening keeps the map
        self.position[n] = self._append(self._name(n), operation, inputs, size, axes)

    def _append(self, name: str, operation: Operation, inputs: tuple[int, ...], size: Size | None, axes: int) -> int:
        """`axes`: that the result has in torch."""
        known = size is not None
        self.nodes.append(Node(name, operation, inputs, size, flat=known and axes == 2, line=known and axes == 3))
        return len(self.nodes) - 1

    def _name(self, n: fx.Node) -> str:
        return str(n.target).removeprefix("model.") if n.op == "call_module" else n.name

    def _activation(self, n: fx.Node) -> Size | None:
        return activation_size(self.one[n], self.other[n], lines=self.lines)

    def _map_size(self, operation: Operation, inputs: tuple[int, ...]) -> Size:
        sizes = [size for position in inputs if (size := self.nodes[position].size) is not None]
        channels = sum(size[0] for size in sizes) if isinstance(operation, Concatenate) else sizes[0][0]
        return channels, *sizes[0][1:]

    def _operation(self, n: fx.Node) -> tuple[Operation, tuple[int, ...]]:
        """What a call does, and to the results of which nodes."""
        sources = tuple(self.position[source] for source in n.all_input_nodes)
        if self._activation(n) is not None and all(self.nodes[source].size is not None for source in sources):
            operation: Operation | None
            if n.op == "call_module":
                operation, inputs = self._module(n, sources)
            else:
                known = not _overwrites(n) or (len(sources) == 1 and self._may_overwrite(n))
                operation, inputs = _function(n) if known else None, sources
                if operation is None and len(sources) == 1:
                    operation = self._of_map(n, self.nodes[sources[0]])
            if isinstance(operation, Concatenate):  # perhaps of one value twice
                inputs = tuple(self.position[source] for source in n.args[0])  # type: ignore[union-attr, index]
            if isinstance(operation, Multiply):
                inputs = self._larger_first(inputs)
            if isinstance(operation, Add | Multiply | Concatenate) and not self._aligned(operation, inputs):
                operation = None
            if operation is not None:
                return operation, inputs
        return self._call(n), sources

    def _of_map(self, n: fx.Node, source: Node) -> Operation | None:
        """What a call does whose meaning depends on the axes of its input."""
        if drops_length(n, source):
            return Same()
        pooling = _pooling_module(n, len(source.shape) - 1)
        return None if pooling is None else _module_operation(pooling, source, self._activation(n))

    def _may_overwrite(self, n: fx.Node) -> bool:
        """Whether n writes over memory that has no other name, so that it can be taken for a new result: what reads its
        input later then reads that."""
        (source,) = n.all_input_nodes
        if len(source.users) == 1:
            while isinstance(self._operation_of(source), Same) and len(source.users) == 1:
                (source,) = source.all_input_nodes
            return len(source.users) == 1 and (n.op == "call_module" or self._is_own(source))
        # An earlier reader may have made another name for it.
        earlier = [user for user in source.users if user is not n and user in self.position]
        return self._is_own(source) and not any(isinstance(self._operation_of(u), Same | Call) for u in earlier)

    def _operation_of(self, n: fx.Node) -> Operation:
        return self.nodes[self.position[n]].operation

    def _is_own(self, n: fx.Node) -> bool:
        return isinstance(self._operation_of(n), _OWN_MEMORY) and n.target is not operator.iadd

    def _larger_first(self, sources: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(sources, key=lambda source: -prod(self.nodes[source].size or (0,))))

    def _aligned(self, operation: Add | Multiply | Concatenate, sources: tuple[int, ...]) -> bool:
        """Whether the maps have one size, and for a sum as many channels: torch would also stretch some of them."""
        sizes = [self.nodes[source].size for source in sources]
        if len({len(self.nodes[source].shape) for source in sources}) > 1:
            return False
        if isinstance(operation, Multiply):
            (size, other) = sizes
            return size is not None and other in (size, (size[0], 1, 1))
        if isinstance(operation, Add):
            return len(set(sizes)) == 1
        return len({size[1:] for size in sizes if size is not None}) == 1

    def _module(self, n: fx.Node, sources: tuple[int, ...]) -> tuple[Operation | None, tuple[int, ...]]:
        module = self.traced.get_submodule(str(n.target))
        if len(sources) != 1 or n.kwargs or n.args != tuple(n.all_input_nodes) or _hooked(module):
            return None, sources
        if _overwrites(n, module) and not self._may_overwrite(n):
            return None, sources  # what else reads the input reads what torch writes there
        source = self.nodes[sources[0]]
        if is_convolution_of(module, source) and module.padding_mode != "zeros":
            padding = module._reversed_padding_repeated_twice
            padded = _padded(source.size, padding)
            operation = _convolution(module, padded)
            if operation is None:
                return None, sources
            pad = Call(F.pad, (Slot(0), padding, module.padding_mode), {}, "pad", "functional.pad")
            axes = len(source.shape) + 1
            return operation, (self._append(f"{self._name(n)}.pad", pad, sources, padded, axes),)
        return _module_operation(module, source, self._activation(n)), sources

    def _call(self, n: fx.Node) -> Call:
        """Left to torch."""
        slots: dict[fx.Node, Any] = {source: Slot(index) for index, source in enumerate(n.all_input_nodes)}
        args = _plain(fx.map_arg(n.args, slots.__getitem__))
        kwargs = _plain(fx.map_arg(n.kwargs, slots.__getitem__))
        if n.op == "call_module":
            module = self.traced.get_submodule(str(n.target))
            kind = type(module).__name__
            known = as_function(module) if len(args) == 1 and not kwargs and not _hooked(module) else None
            if known is None:
                return Call(module, args, kwargs, kind)
            function, arguments = known
            return Call(original(function), args, arguments, kind, function)
        first = self.one[n.args[0]].kind if n.args and isinstance(n.args[0], fx.Node) else None
        if n.op == "call_method":
            kind = str(n.target)
            if first is Tensor:
                return Call(Method(kind), args, kwargs, kind, method_name(kind))
            return Call(partial(_call_method, kind), args, kwargs, kind)
        if n.target is getattr and first is Tensor:
            kind = str(args[1])
            return Call(Attribute(kind), args[:1], {}, kind, method_name(kind))
        kind = getattr(n.target, "__name__", str(n.target))
        name = function_name(n.target)
        # The operators in a file are those of tensors and numbers, and of sequences' items.
        if name == "operator.getitem":
            limited = first is not None and issubclass(first, Tensor | tuple | list)
        else:
            limited = name is None or not name.startswith("operator.") or self.one[n].kind in (Tensor, int, float)
        return Call(n.target, args, kwargs, kind, name if limited else None)  # type: ignore[arg-type]


def _is_named_tuple(n: fx.Node) -> bool:
    """Whether n makes one, which torch.fx takes for a call."""
    return isinstance(n.target, type) and issubclass(n.target, tuple) and hasattr(n.target, "_fields")


def _plain(arguments: Any) -> Any:
    """Without torch.fx's own kinds of lists and dictionaries."""
    if isinstance(arguments, dict):
        return {key: _plain(value) for key, value in arguments.items()}
    if isinstance(arguments, list):
        return [_plain(value) for value in arguments]
    return tuple(_plain(value) for value in arguments) if type(arguments) is tuple else arguments


def _call_method(name: str, target: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(target, name)(*args, **kwargs)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _padded(size: Size | None, padding: list[int]) -> Size:
    """The size of a map with rows and columns more, as `torch.nn.functional.pad` takes them."""
    assert size is not None
    left, right, top, bottom = (*padding, 0, 0)[:4]
    return size[0], size[1] + top + bottom, size[2] + left + right


def _module_operation(module: nn.Module, source: Node, result: Size | None) -> Operation | None:
    assert source.size is not None
    if is_convolution_of(module, source):
        return _convolution(module, source.size)
    if type(module) is nn.Linear and source.flat:
        channels, height, width = source.size
        weight = module.weight.reshape(-1, channels, height, width)
        return Convolve(weight, module.bias, Geometry((height, width), (height, width)))
    if type(module) in (nn.BatchNorm2d, nn.BatchNorm1d) and (not source.flat or source.size[1:] == (1, 1)):
        return _batch_norm(module)
    function = module_nonlinearity(module)
    if function is not None:
        return function
    if type(module) in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity):
        return Same()
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) in ((1, -1), (1, len(source.shape))):
        return Same()
    pooling = pooling_of(module, source)
    if type(pooling) is nn.AdaptiveAvgPool2d:
        return None if result is None else _adaptive_mean(source.size[1:], result[1:])
    return None if pooling is None else _pooling(pooling, source.size)


def _adaptive_mean(size: tuple[int, int], result: tuple[int, int]) -> Operation | None:
    """Of windows that do not overlap; of single pixels too, for the result has memory of its own."""
    if any(side % count for side, count in zip(size, result, strict=True)):
        return None
    kernel = size[0] // result[0], size[1] // result[1]
    return Pooling(Geometry(size, kernel, kernel), average=True)


def _function(n: fx.Node) -> Operation | None:
    arguments = {name: value for name, value in n.kwargs.items() if name != "inplace"}
    function = call_nonlinearity(n.target, n.args[1:], arguments) if n.args else None
    if function is not None:
        return function
    if n.target is torch.cat and (n.args[1:] == (1,) or (len(n.args) == 1 and n.kwargs == {"dim": 1})):
        return Concatenate()
    if n.target in (torch.flatten, "flatten") and (n.args[1:], dict(n.kwargs)) in (((1,), {}), ((), {"start_dim": 1})):
        return Same()
    sums = (operator.add, operator.iadd, torch.add)
    if n.target in sums and len(n.args) == 2 and len(n.all_input_nodes) == 2 and not n.kwargs:
        return Add()
    products = (operator.mul, torch.mul, "mul")
    if n.target in products and len(n.args) == 2 and len(n.all_input_nodes) == 2 and not n.kwargs:
        return Multiply()
    if n.target is F.dropout and n.kwargs.get("training", (*n.args, True, True)[2]) is False:
        return Same()
    # torchvision's residual networks drop whole branches, in training.
    if getattr(n.target, "__name__", None) == "stochastic_depth" and n.args[3:] == (False,):
        return Same()
    return None


def _overwrites(n: fx.Node, module: nn.Module | None = None) -> bool:
    """Whether a call of one input writes its result there."""
    if isinstance(module, nn.modules.dropout._DropoutNd) or n.target is F.dropout:
        return False  # not in evaluation
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = getattr(n.target, "__name__", str(n.target))
    return bool(n.kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__")))


def _convolution(module: nn.Conv1d | nn.Conv2d, size: Size) -> Convolve | None:
    """Of maps of `size`, which are padded already unless it pads with zeros; None if what follows it is not known."""
    geometry = Geometry.of_conv(module, size[1:])
    weight = module.weight.unsqueeze(2) if isinstance(module, nn.Conv1d) else module.weight
    if type(module) in (nn.Conv1d, nn.Conv2d):
        return Convolve(weight, module.bias, geometry, module.groups)
    if type(module) not in (TargetConv1d, TargetConv2d):
        return None
    assert isinstance(module, TargetConv1d | TargetConv2d)
    loc, scale = whole_rows(module.loc, module.scale)
    attention = Attention(loc, scale, module.attention, module.scale_unit, module.clip)
    if not _is_attention_of(attention, module, geometry.output_size):
        return None
    return Convolve(weight, module.bias, geometry, module.groups, attention)


def _is_attention_of(attention: Attention, module: TargetConv1d | TargetConv2d, size: tuple[int, ...]) -> bool:
    """Whether the layer's own windows and ROIs are these: they may have been given others."""
    own_size = size[-module.num_dims :]
    own, ours = module.window(own_size), attention.window(size)
    if not torch.allclose(own.view_as(ours), ours, rtol=1e-4, atol=1e-6, equal_nan=True):
        return False
    return not module.clip or torch.equal(module.rois(own_size), roi_bounds(own_size, module.loc, module.scale))


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
        padded_alike = padding == (0, 0) or module.count_include_pad
        unusual = module.divisor_override is not None or not padded_alike or module.ceil_mode
    else:
        unusual = module.return_indices
    if unusual:
        return None
    dilation = (1, 1) if average else pair(module.dilation)
    geometry = Geometry(size[1:], kernel, stride, padding, padding, dilation)
    geometry = geometry.covered() if module.ceil_mode else geometry
    # Where all of a window is padding, which dilation allows, torch gives minus infinity.
    return Pooling(geometry, average) if geometry.reaches_everywhere() else None


#: Functions that pool: of how many axes, and the modules of the same first arguments.
_POOLINGS: dict[Any, tuple[int, type[nn.Module]]] = {
    F.adaptive_avg_pool1d: (1, nn.AdaptiveAvgPool1d),
    F.adaptive_avg_pool2d: (2, nn.AdaptiveAvgPool2d),
    F.avg_pool1d: (1, nn.AvgPool1d),
    F.avg_pool2d: (2, nn.AvgPool2d),
    F.max_pool1d: (1, nn.MaxPool1d),
    F.max_pool2d: (2, nn.MaxPool2d),
    torch.max_pool1d: (1, nn.MaxPool1d),
    torch.max_pool2d: (2, nn.MaxPool2d),
}


def _pooling_module(n: fx.Node, dims: int) -> nn.Module | None:
    """The module that pools maps of `dims` axes as a call of a function or method does."""
    args: Any = n.args[1:]
    kwargs: Any = n.kwargs
    if not n.args or dims < 1:
        return None
    if n.target in (torch.mean, "mean"):
        given = (*args, *(kwargs[key] for key in ("dim", "keepdim") if key in kwargs))
        axes = given[0] if given else None
        axes = (axes,) if isinstance(axes, int) else axes
        if (
            set(kwargs) <= {"dim", "keepdim"}
            and isinstance(axes, list | tuple)
            and {int(i) % (2 + dims) for i in axes} == set(range(2, 2 + dims))
        ):
            return (nn.AdaptiveAvgPool1d if dims == 1 else nn.AdaptiveAvgPool2d)(1)
        return None
    of, kind = _POOLINGS.get(n.target, (0, nn.Identity))
    if of != dims or not all(value is None or _is_side(value, dims) for value in (*args, *kwargs.values())):
        return None  # such as (2,) for both sides
    if not issubclass(kind, nn.MaxPool1d | nn.MaxPool2d) or len(args) <= 4:
        return kind(*args, **kwargs)
    # Beyond these the functions' and the module's orders differ.
    if n.target in (torch.max_pool1d, torch.max_pool2d) and not kwargs:
        kernel_size, stride, padding, dilation, ceil_mode = args
        return kind(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)
    return None


def _is_side(value: Any, dims: int) -> bool:
    """Whether it is a whole number or a flag, or `dims` of them."""
    if isinstance(value, list | tuple):
        return len(value) == dims and all(isinstance(one, int) for one in value)
    return isinstance(value, int)
