"""From a network to its graph: each of its traced calls as an operation."""

from __future__ import annotations

import copy
import operator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tkn.adaptive import adaptive_layers
from tkn.app.messages import first_line
from tkn.layers import TargetConvNd
from tkn.plan.arithmetic import IN_PLACE, arithmetic_name, as_affine
from tkn.plan.compare import random_inputs
from tkn.plan.form import Form, Slot, called_with, slotted
from tkn.plan.graph import (
    AdaptivePooling,
    Add,
    Affine,
    Call,
    ChannelNorm,
    Concatenate,
    Constant,
    Convolve,
    Graph,
    Input,
    Multiply,
    Node,
    Operation,
    Pooling,
    Resize,
    Same,
    Select,
    Size,
    UnevenMean,
)
from tkn.plan.known_modules import convolution, module_of_last, module_operation
from tkn.plan.lines import is_convolution_of
from tkn.plan.moves import insert_numbers, is_pixels, moves, selection
from tkn.plan.nonlinearity import Nonlinearity, call_nonlinearity
from tkn.plan.resizing import mean_axis, resampling_module
from tkn.plan.sizes import result_size
from tkn.plan.torch_calls import has_hooks, torch_call, writes_over
from tkn.plan.trace import BATCHES, Seen, activation_size, observe, trace
from tkn.plan.vocabulary import Method, method_name
from tkn.several import PartsConvNd


def frozen(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without gradients, whose target layers are torch's. ValueError for layers whose ROIs
    follow the image."""
    for name in adaptive_layers(model):
        raise ValueError(
            f"a plan's ROIs are the same for all images, and layer {name!r} has others for each (adaptive)"
        )
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if isinstance(model, PartsConvNd):
        model = model.unrolled()
    for name, module in list(model.named_modules()):
        if isinstance(module, PartsConvNd):
            model.set_submodule(name, module.unrolled())
    for module in model.modules():
        if isinstance(module, TargetConvNd):
            module.engine = "dense"
    return model


@torch.no_grad()
def build_graph(model: nn.Module, input_size: Any) -> Graph:
    """The operations of a `frozen` model for inputs of a size, or of several (`called_with`); it shares the model's
    parameters.

    ValueError if it fails on inputs [B, C, L], which may have been meant as one image of two dimensions.
    """
    arguments, shapes = called_with(input_size)
    lines = any(len(shape) == 2 for shape in shapes)
    try:
        traced = trace(model, arguments, [1 + len(shape) for shape in shapes])
        seen = [observe(traced, random_inputs(batch, shapes)) for batch in BATCHES]
    except (RuntimeError, ValueError, TypeError) as error:  # torch's modules raise the first two
        if all(len(shape) == 3 for shape in shapes) and not isinstance(error, TypeError):
            raise
        images = " and ".join(f"[B, {', '.join(map(str, shape))}]" for shape in shapes)
        cause = first_line(error)
        raise ValueError(f"{type(model).__name__} takes no images {images}: {cause}") from error
    return _Builder(traced, seen[0], seen[1], lines=lines).graph(arguments)


#: What has memory of its own in torch too.
_OWN_MEMORY = (
    *(Convolve, Affine, Add, Multiply, Concatenate, Nonlinearity, ChannelNorm),
    *(Pooling, UnevenMean, AdaptivePooling, Resize),
)


class _Builder:
    """Makes nodes of the traced calls; `one`, `other`: what was seen in runs on batches of the two sizes; `lines`: the
    network's images are [B, C, L], and other such values are activations too."""

    def __init__(
        self, traced: fx.GraphModule, one: dict[fx.Node, Seen], other: dict[fx.Node, Seen], *, lines: bool
    ) -> None:
        self.traced, self.one, self.other, self.lines = traced, one, other, lines
        insert_numbers(traced.graph, one, other)
        self.moved = moves(traced, one, other, self._written())
        self.nodes: list[Node] = []
        #: of what torch sees as it is in the graph
        self.position: dict[fx.Node, int] = {}
        #: of maps that torch sees with their channels last
        self.last: dict[fx.Node, int] = {}
        #: of one pixel that torch sees at all pixels of a map
        self.stretched: dict[fx.Node, int] = {}
        #: of calls that nothing misses if nothing reads them
        self.idle: set[int] = set()

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
                self._add(n, Constant(self._constant(n)), ())
                self.idle.add(self.position[n])
            elif not self._add_known(n):
                operation = torch_call(n, self.traced, self.one)
                self._add(n, operation, tuple(map(self._torch_position, n.all_input_nodes)))
                idle = n in self.moved or self.one[n].kind is not Tensor or mean_axis(n) is not None
                if self._note_stretched(n) or idle:
                    self.idle.add(self.position[n])
        for output in outputs:
            if self.one[output].kind is not Tensor:
                raise ValueError(
                    f"accelerate takes networks that return tensors, alone or in lists, tuples and dictionaries: "
                    f"{self._name(output)} is a {self.one[output].kind.__name__}"
                )
        if not outputs:
            raise ValueError("accelerate takes networks that return tensors: this one returns none that it computes")
        return self._without_idle([self._torch_position(output) for output in outputs], form)

    def _note_stretched(self, n: fx.Node) -> bool:
        """Whether a call repeats one pixel for those of a map, as a product would."""
        source = n.args[0] if n.target in ("expand", "expand_as") else None
        if not isinstance(source, fx.Node) or source not in self.position:
            return False
        size, made = self.nodes[self.position[source]].size, self._activation(n)
        if size is None or made is None or (*made[:1], 1, 1) != size:
            return False
        self.stretched[n] = self.position[source]
        return True

    def _without_idle(self, outputs: list[int], form: Form) -> Graph:
        """The graph of what is needed."""
        needed = {*outputs}
        for position in reversed(range(len(self.nodes))):
            node = self.nodes[position]
            kept = isinstance(node.operation, Input) or (isinstance(node.operation, Call) and position not in self.idle)
            if position in needed or kept:
                needed |= {position, *node.inputs}
        place = {old: new for new, old in enumerate(sorted(needed))}
        nodes = [
            replace(node, inputs=tuple(place[source] for source in node.inputs))
            for node in (self.nodes[old] for old in place)
        ]
        return Graph(nodes, [place[output] for output in outputs], form)

    def _written(self) -> list[fx.Node]:
        """What calls write over."""
        calls = [n for n in self.traced.graph.nodes if n.op.startswith("call") and n.args]
        written = [n.args[0] for n in calls if _overwrites(n, self._module_of(n))]
        return [n for n in written if isinstance(n, fx.Node)]

    def _module_of(self, n: fx.Node) -> nn.Module | None:
        return self.traced.get_submodule(str(n.target)) if n.op == "call_module" else None

    def _add(self, n: fx.Node, operation: Operation, inputs: tuple[int, ...]) -> None:
        self.position[n] = self._append(self._name(n), operation, inputs, self._activation(n), len(self.one[n].shape))

    def _add_known(self, n: fx.Node) -> bool:
        """Whether the engine knows what a call does, which then is among the nodes."""
        size, axes = self._activation(n), len(self.one[n].shape)
        if size is None:
            return False
        if self._add_selection(n):
            return True
        pixels = self._pixels_of_mean(n)
        maps = self._maps(n) if pixels is None else [(pixels, False)]
        if not maps:
            return False
        before = len(self.nodes)
        operation, inputs = self._operation(n, [position for position, _ in maps])
        sources = [self.nodes[position] for position in inputs]
        if operation is None or not self._fits(operation, sources, size, axes, last=maps[0][1]):
            del self.nodes[before:]
            return False
        made = self._append(self._name(n), operation, inputs, _size(operation, sources, axes), axes)
        (self.last if maps[0][1] else self.position)[n] = made
        if _overwrites(n, self._module_of(n)):  # what reads it later reads this
            (self.last if maps[0][1] else self.position)[n.args[0]] = made  # type: ignore[index]
        return True

    def _fits(self, operation: Operation, sources: list[Node], size: Size, axes: int, *, last: bool) -> bool:
        """Whether the operation can be of these sources, and gives what torch does: it stretches some maps."""
        made = _size(operation, sources, axes)
        if made is None:
            return False
        seen = (made[1], made[2], made[0]) if last else made
        return prod(made) == size[0] if axes == 2 else seen == size

    def _maps(self, n: fx.Node) -> list[tuple[int, bool]]:
        """The maps that a call reads, all as they are or all with their channels last; none if it reads other tensors,
        but for constants."""
        sources = [source for source in n.all_input_nodes if source.op != "get_attr" and not self._is_constant(source)]
        maps = [(self._map_position(source), source in self.last) for source in sources]
        known = all(self.nodes[position].size is not None for position, _ in maps)
        return maps if known and len({last for _, last in maps}) == 1 else []

    def _map_position(self, n: fx.Node) -> int:
        """Of a value as the engine sees it."""
        if n in self.last:
            return self.last[n]
        return self.stretched.get(n, self.position[n])

    def _is_constant(self, n: fx.Node) -> bool:
        return n.op == "get_attr" or (n in self.moved and self.moved[n].base.op == "get_attr")

    def _constant(self, n: fx.Node) -> Any:
        """A number of the network itself, or a view of it."""
        if n in self.moved:
            return self._constant(self.moved[n].base).reshape(-1)[self.moved[n].indices[0]]
        return operator.attrgetter(str(n.target))(self.traced)

    def _add_selection(self, n: fx.Node) -> bool:
        """Whether a call selects channels of a map, or puts them last or back, or flattens: then it is known."""
        moved = self.moved.get(n)
        if moved is None:
            return False
        base = moved.base
        last = base in self.last
        position = self.last[base] if last else self.position[base]
        node = self.nodes[position]
        selected = None if node.size is None else selection(moved, node.size, last=last, line=node.line)
        if selected is None or node.size is None:
            return False
        axes = len(self.one[n].shape)
        if node.flat and axes != 2 and (axes, *node.size[1:]) != (4, 1, 1):  # but for maps of one pixel
            return False
        whole = torch.equal(selected.channels, torch.arange(node.size[0], device="cpu"))
        if not (whole and selected.last):
            size = (len(selected.channels), *node.size[1:])
            if not whole:
                select = Select(selected.channels.long())
                position = self._append(self._name(n), select, (position,), size, 1 + len(node.shape))
            if whole or selected.flat != node.flat:
                position = self._append(self._name(n), Same(), (position,), size, axes)
        (self.last if selected.last else self.position)[n] = position
        return True

    def _torch_position(self, n: fx.Node) -> int:
        """Of a value as torch sees it."""
        if n not in self.position:
            permute = Call(Method("permute"), (Slot(0), 0, 2, 3, 1), {}, "permute", method_name("permute"))
            name = f"{self._name(n)}.permute"
            self.position[n] = self._append(name, permute, (self.last[n],), self._activation(n), 4)
            self.idle.add(self.position[n])
        return self.position[n]

    def _append(self, name: str, operation: Operation, inputs: tuple[int, ...], size: Size | None, axes: int) -> int:
        """`axes`: that the result has in torch."""
        known = size is not None
        self.nodes.append(Node(name, operation, inputs, size, flat=known and axes == 2, line=known and axes == 3))
        return len(self.nodes) - 1

    def _name(self, n: fx.Node) -> str:
        return str(n.target).removeprefix("model.") if n.op == "call_module" else n.name

    def _activation(self, n: fx.Node) -> Size | None:
        return activation_size(self.one[n], self.other[n], lines=self.lines)

    def _operation(self, n: fx.Node, maps: list[int]) -> tuple[Operation | None, tuple[int, ...]]:
        """What a call does, if the engine knows it, and to the results of which nodes; `maps`: what it reads."""
        if _overwrites(n, self._module_of(n)) and not self._may_overwrite(n):
            return None, ()  # what else reads the input reads what torch writes there
        if n.op == "call_module":
            return self._module(n, maps)
        sources = tuple(maps)
        operation: Operation | None = self._with_number(n, maps) or _of_single_numbers(n)
        module = self._layer_norm(n) or resampling_module(n, self._axes_of_pixels(n))
        if self._pixels_of_mean(n) is not None:
            module = nn.AdaptiveAvgPool2d(1)
        if operation is None and len(maps) == 1 and module is not None:
            operation = self._of_module(module, n, maps[0])
        if operation is None and _is_flattening(n) and n.args[0] not in self.last:
            operation = Same()
        if operation is None and _is_joining_channels(n) and n.all_input_nodes[0] not in self.last:
            operation = Concatenate()
        if isinstance(operation, Add | Multiply | Concatenate):  # perhaps of one map twice
            of: Any = n.args[0] if isinstance(operation, Concatenate) else n.args
            sources = tuple(map(self._map_position, of))
        if isinstance(operation, Multiply):
            sources = tuple(sorted(sources, key=lambda source: -prod(self.nodes[source].size or (0,))))
        if isinstance(operation, Add) and arithmetic_name(n.target) == "sub":
            sources = (sources[0], self._negated(n, sources[1]))
        return operation, sources

    def _axes_of_pixels(self, n: fx.Node) -> int:
        """Of what a call reads: 2 of a map, 1 of a line."""
        source = n.args[0] if n.args else None
        return len(self.one[source].shape) - 2 if isinstance(source, fx.Node) else 0

    def _pixels_of_mean(self, n: fx.Node) -> int | None:
        """The map of which a call gives the mean of all pixels, by a mean of all in one line or of one axis after the
        other."""
        source = n.args[0] if n.args else None
        if mean_axis(n) not in (2, -1) or not isinstance(source, fx.Node) or len(self.one[source].shape) != 3:
            return None
        moved, axis = self.moved.get(source), mean_axis(source)
        of = moved.base if moved is not None else source.args[0] if axis in (2, 3, -1) else None
        if not isinstance(of, fx.Node) or of not in self.position:
            return None
        node = self.nodes[self.position[of]]
        if node.size is None or len(node.shape) != 3 or (moved is not None and not is_pixels(moved, node.size)):
            return None
        return self.position[of]

    def _layer_norm(self, n: fx.Node) -> nn.LayerNorm | None:
        """The module that normalises as a call does."""
        if n.target is not F.layer_norm:
            return None
        given: dict[str, Any] = {
            **dict(zip(("normalized_shape", "weight", "bias", "eps"), n.args[1:], strict=False)),
            **n.kwargs,
        }
        values = {
            key: self._constant(value) if isinstance(value, fx.Node) and self._is_constant(value) else value
            for key, value in given.items()
        }
        if any(isinstance(value, fx.Node) for value in values.values()):
            return None
        module = nn.LayerNorm(values["normalized_shape"], values.get("eps", 1e-5), elementwise_affine=False)
        for key in ("weight", "bias"):
            if values.get(key) is not None:
                setattr(module, key, nn.Parameter(values[key], requires_grad=False))
        return module

    def _negated(self, n: fx.Node, position: int) -> int:
        node = self.nodes[position]
        minus = -torch.ones((node.size or (0,))[0], dtype=torch.float64, device="cpu")
        return self._append(
            f"{self._name(n)}.minus", Affine(minus, 0 * minus), (position,), node.size, len(node.shape) + 1
        )

    def _with_number(self, n: fx.Node, maps: list[int]) -> Affine | None:
        """A map plus, minus, times or by a number, or one of each channel; or minus a map."""
        if len(maps) != 1 or n.kwargs or arithmetic_name(n.target) is None:
            return None
        places = [place for place, arg in enumerate(n.args) if isinstance(arg, fx.Node) and not self._is_constant(arg)]
        if len(places) != 1:  # of one map twice
            return None
        channels = (self.nodes[maps[0]].size or (0,))[0]
        others = [arg for place, arg in enumerate(n.args) if place != places[0]]
        numbers = [self._numbers(arg, n.args[places[0]], channels) for arg in others]
        if len(numbers) > 1 or (numbers and numbers[0] is None):
            return None
        made = as_affine(n.target, numbers[0] if numbers else None, places[0])
        if made is None or not all(bool(one.isfinite().all()) for one in made):
            return None
        scale, shift = (one.expand(channels).contiguous() for one in made)
        return Affine(scale, shift)

    def _numbers(self, argument: Any, of: Any, channels: int) -> Tensor | None:
        """An argument beside a map as a number, or one of each channel [C]; None if it is something else."""
        if isinstance(argument, int | float) and not isinstance(argument, bool):
            return torch.tensor(float(argument), dtype=torch.float64, device="cpu")
        value = self._constant(argument) if isinstance(argument, fx.Node) and self._is_constant(argument) else None
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return None
        axes = len(self.one[of].shape)
        if value.dim() > axes:
            return None
        shape = (*(1,) * (axes - value.dim()), *value.shape)
        along = axes - 1 if of in self.last else 1
        if shape[along] not in (1, channels) or prod(shape) != shape[along]:
            return None
        return value.detach().reshape(-1).double()

    def _may_overwrite(self, n: fx.Node) -> bool:
        """Whether n writes over memory that has no other name, so that it can be taken for a new result: what reads its
        input later then reads that."""
        source = n.args[0]
        if not isinstance(source, fx.Node):
            return False
        if len(source.users) == 1:
            return self._is_unseen(source)
        # An earlier reader may have made another name for it.
        earlier = [user for user in source.users if user is not n and (user in self.position or user in self.last)]
        return self._is_own(source) and not any(
            user in self.moved or isinstance(self._operation_of(user), Same | Call) for user in earlier
        )

    def _is_unseen(self, source: fx.Node) -> bool:
        """Whether nothing else reads the memory of a value, which may be that of what it is made of."""
        if len(source.users) > 1 or source.op == "get_attr":
            return False
        return self._is_own(source) or all(map(self._is_unseen, source.all_input_nodes))

    def _operation_of(self, n: fx.Node) -> Operation:
        return self.nodes[self.last[n] if n in self.last else self.position[n]].operation

    def _is_own(self, n: fx.Node) -> bool:
        return isinstance(self._operation_of(n), _OWN_MEMORY) and n.target not in IN_PLACE

    def _module(self, n: fx.Node, maps: list[int]) -> tuple[Operation | None, tuple[int, ...]]:
        module = self.traced.get_submodule(str(n.target))
        if len(maps) != 1 or n.kwargs or n.args != tuple(n.all_input_nodes) or has_hooks(module):
            return None, ()
        source = self.nodes[maps[0]]
        if is_convolution_of(module, source) and module.padding_mode != "zeros":
            padding = module._reversed_padding_repeated_twice
            padded = _padded(source.size, padding)
            operation = convolution(module, padded)
            if operation is None or n.args[0] in self.last:
                return None, ()
            pad = Call(F.pad, (Slot(0), padding, module.padding_mode), {}, "pad", "functional.pad")
            axes = len(source.shape) + 1
            return operation, (self._append(f"{self._name(n)}.pad", pad, tuple(maps), padded, axes),)
        return self._of_module(module, n, maps[0]), tuple(maps)

    def _of_module(self, module: nn.Module, n: fx.Node, position: int) -> Operation | None:
        """What a module does in place of a call, which reads the map at `position`."""
        source = self.nodes[position]
        if n.all_input_nodes[0] in self.last:
            return module_of_last(module, source)
        return module_operation(module, source, self._activation(n))


def _is_named_tuple(n: fx.Node) -> bool:
    """Whether n makes one, which torch.fx takes for a call."""
    return isinstance(n.target, type) and issubclass(n.target, tuple) and hasattr(n.target, "_fields")


def _size(operation: Operation, sources: list[Node], axes: int) -> Size | None:
    """Of the map that an operation makes of these, which torch sees with so many axes; None if it can't be of them."""
    try:
        return result_size(Node("", operation, (), None, axes == 2, axes == 3), sources)
    except ValueError:
        return None


def _padded(size: Size | None, padding: list[int]) -> Size:
    """The size of a map with rows and columns more, as `torch.nn.functional.pad` takes them."""
    assert size is not None
    left, right, top, bottom = (*padding, 0, 0)[:4]
    return size[0], size[1] + top + bottom, size[2] + left + right


def _of_single_numbers(n: fx.Node) -> Operation | None:
    """Functions of the numbers at one place of one map or two."""
    arguments = {name: value for name, value in n.kwargs.items() if name != "inplace"}
    function = call_nonlinearity(n.target, n.args[1:], arguments) if n.args else None
    if function is not None:
        return function
    if len(n.args) == 2 and all(isinstance(arg, fx.Node) for arg in n.args) and not n.kwargs:
        name = arithmetic_name(n.target)
        if name in ("add", "sub"):
            return Add()
        if name == "mul":
            return Multiply()
    if n.target is F.dropout and n.kwargs.get("training", (*n.args, True, True)[2]) is False:
        return Same()
    # torchvision's residual networks drop whole branches, in training.
    if getattr(n.target, "__name__", None) == "stochastic_depth" and n.args[3:] == (False,):
        return Same()
    return None


def _is_joining_channels(n: fx.Node) -> bool:
    return n.target in (torch.cat, torch.concat) and (
        n.args[1:] == (1,) or (len(n.args) == 1 and n.kwargs in ({"dim": 1}, {"axis": 1}))
    )


def _is_flattening(n: fx.Node) -> bool:
    if n.target not in (torch.flatten, "flatten"):
        return False
    return (n.args[1:], dict(n.kwargs)) in (((1,), {}), ((), {"start_dim": 1}))


def _overwrites(n: fx.Node, module: nn.Module | None = None) -> bool:
    """Whether a call writes its result where its first argument is."""
    if isinstance(module, nn.modules.dropout._DropoutNd) or n.target is F.dropout:
        return False  # not in evaluation
    if module is not None:
        return bool(getattr(module, "inplace", False))
    return writes_over(n)
