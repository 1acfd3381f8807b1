"""From what a plan's file holds to its graph: every field is checked before anything uses it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tkn.app.messages import first_line
from tkn.attention import ATTENTION
from tkn.geometry import Geometry
from tkn.plan.encode import DTYPES, KINDS
from tkn.plan.form import ONE_TENSOR, Form, Slot, only_slots
from tkn.plan.graph import (
    AdaptivePooling,
    Add,
    Affine,
    Attention,
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
from tkn.plan.nonlinearity import FUNCTIONS, Nonlinearity, Relu
from tkn.plan.sizes import result_size
from tkn.plan.vocabulary import VOCABULARY

#: Of numbers among a call's arguments, and of pixels.
_LARGEST = 2**31 - 1
_LONGEST_NAME = 1000


def fields(value: Any, *names: str) -> list[Any]:
    """The values of a JSON object that has just these fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{_shown(value)} is no object")
    if set(value) != set(names):
        odd = set(value) ^ set(names)
        raise ValueError(f"missing or unknown: {', '.join(sorted(map(_shown, odd)))}")
    return [value[name] for name in names]


def whole(value: Any, least: int = 0, most: int = _LARGEST) -> int:
    """A whole number within [least, most]."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{_shown(value)} is no whole number within {least} and {most}")
    return value


def _pair(value: Any, least: int) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{_shown(value)} is no pair")
    return whole(value[0], least), whole(value[1], least)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{_shown(value)} is neither true nor false")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{_shown(value)} is no number")
    return float(value)


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > _LONGEST_NAME:
        raise ValueError(f"{_shown(value)} is no name")
    return value


def _size(value: Any) -> tuple[Size, bool]:
    """(C, H, W), and whether torch sees it as [B, C, L]."""
    if not isinstance(value, list) or len(value) not in (2, 3):
        raise ValueError(f"{_shown(value)} is no size")
    sides = [whole(side, 1) for side in value]
    channels, height, width = sides if len(sides) == 3 else (sides[0], 1, sides[1])
    return (channels, height, width), len(sides) == 2


def _shown(value: Any) -> str:
    return repr(value)[:60]


def decoded(nodes: Any, output: Any, form: Any, tensors: dict[str, Tensor]) -> Graph:
    """The graph, of one tensor each if `form` is None; ValueError that says which node is wrong.

    What torch will compute is not computed here: whether it has the size that its node says shows when it is.
    """
    if not isinstance(nodes, list) or not nodes:
        raise ValueError("there are no nodes")
    decoder = _Decoder(tensors)
    for position, value in enumerate(nodes):
        try:
            decoder.add(value)
        except ValueError as error:
            raise ValueError(f"node {position}: {first_line(error)}") from error
    unused = set(tensors) - decoder.used
    if unused:
        raise ValueError(f"no node uses {', '.join(sorted(map(_shown, unused))[:3])}")
    inputs = sum(isinstance(node.operation, Input) for node in decoder.nodes)
    outputs = output if isinstance(output, list) else [output]
    return Graph(
        decoder.nodes,
        [whole(position, 0, len(nodes) - 1) for position in outputs],
        _form(form, inputs, len(outputs)),
    )


def _form(value: Any, inputs: int, outputs: int) -> Form:
    if value is None:
        if (inputs, outputs) != (1, 1):
            raise ValueError("a network of several inputs or outputs has no form")
        return ONE_TENSOR
    args, kwargs, result = fields(value, "args", "kwargs", "result")
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError("arguments are a list and an object")
    decoder, taken, given = _Decoder({}), set[int](), set[int]()
    arguments = (
        tuple(decoder.argument(part, inputs, taken) for part in args),
        {key: decoder.argument(part, inputs, taken) for key, part in kwargs.items()},
    )
    made = Form(arguments, decoder.argument(result, outputs, given))
    if not all(map(only_slots, arguments)) or (taken, given) != (set(range(inputs)), set(range(outputs))):
        raise ValueError("its form is not that of its inputs and outputs")
    return made


class _Decoder:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.used: set[str] = set()
        self.nodes: list[Node] = []

    def add(self, value: Any) -> None:
        common = ("name", "operation", "inputs", "size", "flat")
        if not isinstance(value, dict):
            raise ValueError(f"{_shown(value)} is no object")
        name, kind, inputs, size, flat = fields({key: value[key] for key in common if key in value}, *common)
        if not isinstance(inputs, list):
            raise ValueError("inputs are a list")
        positions = tuple(whole(source, 0, len(self.nodes) - 1) for source in inputs)
        sources = [self.nodes[source] for source in positions]
        if kind not in _OPERATIONS:
            raise ValueError(f"unknown operation {_shown(kind)}")
        if kind == KINDS[Input] and not all(isinstance(node.operation, Input) for node in self.nodes):
            raise ValueError("inputs come first")
        if kind != KINDS[Input] and not self.nodes:
            raise ValueError("the first node is an input")
        own, decode = _OPERATIONS[kind]
        operation = decode(self, sources, *fields({key: value[key] for key in value if key not in common}, *own))
        sides, line = (None, False) if size is None else _size(size)
        node = Node(_text(name), operation, positions, sides, _flag(flat), line)
        if not node.by_torch and result_size(node, sources) != node.size:
            raise ValueError(f"its size is not {_shown(size)}")
        if node.flat and (node.size is None or node.line or (node.by_torch and node.size[1:] != (1, 1))):
            raise ValueError("only vectors and unflattened maps are flat")
        self.nodes.append(node)

    def tensor(self, name: Any, dtype: torch.dtype | None = None) -> Tensor:
        if not isinstance(name, str) or name not in self.tensors:
            raise ValueError(f"there is no tensor {_shown(name)}")
        tensor = self.tensors[name]
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{_shown(name)} is of {tensor.dtype}, not {dtype}")
        self.used.add(name)
        return tensor

    def convolve(
        self, sources: list[Node], weight: Any, bias: Any, groups: Any, attention: Any, *geometry: Any
    ) -> Convolve:
        weight = self.tensor(weight, torch.float32)
        if weight.dim() != 4:
            raise ValueError("the weight has not four axes")
        return Convolve(
            weight,
            None if bias is None else self.tensor(bias, torch.float32),
            _geometry(sources, *geometry),
            whole(groups, 1),
            None if attention is None else self.attention(attention),
        )

    def attention(self, value: Any) -> Attention:
        loc, scale, function, scale_unit, clip = fields(value, "loc", "scale", "function", "scale_unit", "clip")
        if not isinstance(function, str) or function not in ATTENTION:
            raise ValueError(f"unknown attention {_shown(function)}")
        if type(scale_unit) not in (int, float) or not 0 < scale_unit < math.inf:
            raise ValueError("scale_unit is positive")
        return Attention(
            self.tensor(loc, torch.float32), self.tensor(scale, torch.float32), function, scale_unit, _flag(clip)
        )

    def affine(self, _: list[Node], scale: Any, shift: Any) -> Affine:
        return Affine(self.tensor(scale, torch.float64), self.tensor(shift, torch.float64))

    def channel_norm(self, _: list[Node], scale: Any, shift: Any, eps: Any) -> ChannelNorm:
        if _number(eps) < 0:
            raise ValueError("eps is not negative")
        return ChannelNorm(self.tensor(scale, torch.float64), self.tensor(shift, torch.float64), float(eps))

    def pool(self, sources: list[Node], average: Any, *sides: Any) -> Pooling:
        return Pooling(_pooling_geometry(sources, *sides, means=_flag(average), ceil=not average), average)

    def uneven_mean(self, sources: list[Node], counts_padding: Any, divisor: Any, *sides: Any) -> UnevenMean:
        geometry = _pooling_geometry(sources, *sides, means=True, ceil=True)
        return UnevenMean(geometry, _flag(counts_padding), None if divisor is None else whole(divisor, 1))

    def adaptive_pool(self, _: list[Node], average: Any, output: Any) -> AdaptivePooling:
        return AdaptivePooling(_pair(output, 1), _flag(average))

    def resize(self, _: list[Node], output: Any, bilinear: Any, align_corners: Any, factors: Any) -> Resize:
        if not isinstance(factors, list) or len(factors) != 2:
            raise ValueError(f"{_shown(factors)} is no pair")
        lines, columns = (None if factor is None else _number(factor) for factor in factors)
        return Resize(_pair(output, 1), _flag(bilinear), _flag(align_corners), (lines, columns))

    def select(self, _: list[Node], channels: Any) -> Select:
        return Select(self.tensor(channels, torch.int64))

    def nonlinearity(self, _: list[Node], function: Any, slope: Any) -> Nonlinearity:
        if _text(function) not in FUNCTIONS or function == Relu().function:
            raise ValueError(f"{_shown(function)} is no function between layers")
        return Nonlinearity(function, _number(slope))

    def constant(self, sources: list[Node], value: Any) -> Constant:
        if sources:
            raise ValueError("it has no inputs")
        return Constant(self.tensor(value))

    def call(self, sources: list[Node], function: Any, kind: Any, args: Any, kwargs: Any) -> Call:
        if not isinstance(function, str) or function not in VOCABULARY:
            raise ValueError(f"unknown function {_shown(function)}")
        if not isinstance(args, list) or not isinstance(kwargs, dict) or "out" in kwargs:
            raise ValueError("arguments are a list and an object, without a place for the result")
        slots: set[int] = set()
        made = Call(
            VOCABULARY[function],
            tuple(self.argument(value, len(sources), slots) for value in args),
            {key: self.argument(value, len(sources), slots) for key, value in kwargs.items()},
            _text(kind),
            function,
        )
        if slots != set(range(len(sources))):
            raise ValueError("an input is not used")
        return made

    def argument(self, value: Any, inputs: int, slots: set[int]) -> Any:
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            return whole(value, -_LARGEST)
        if type(value) is float and math.isfinite(value):
            return value
        if isinstance(value, list):
            return [self.argument(item, inputs, slots) for item in value]
        if not isinstance(value, dict) or len(value) != 1:
            raise ValueError(f"{_shown(value)} is no argument")
        ((kind, content),) = value.items()
        if kind == "input":
            slots.add(whole(content, 0, inputs - 1))
            return Slot(content)
        if kind == "tensor":
            return self.tensor(content)
        if kind == "dtype" and isinstance(content, str) and content in DTYPES:
            return DTYPES[content]
        if kind == "ellipsis" and content is True:
            return Ellipsis
        if kind in ("tuple", "slice") and isinstance(content, list):
            items = [self.argument(item, inputs, slots) for item in content]
            if kind == "tuple":
                return tuple(items)
            if len(items) == 3:
                return slice(*items)
        if kind == "dict" and isinstance(content, dict):
            return {key: self.argument(item, inputs, slots) for key, item in content.items()}
        raise ValueError(f"{_shown(value)} is no argument")


def _geometry(sources: list[Node], kernel: Any, stride: Any, before: Any, after: Any, dilation: Any) -> Geometry:
    if len(sources) != 1 or sources[0].size is None:
        raise ValueError("its input is no activation")
    return Geometry(
        sources[0].size[1:], _pair(kernel, 1), _pair(stride, 1), _pair(before, 0), _pair(after, 0), _pair(dilation, 1)
    )


def _pooling_geometry(sources: list[Node], *sides: Any, means: bool, ceil: bool) -> Geometry:
    """`ceil`: windows may reach beyond what is padded, to cover all of the map."""
    geometry = _geometry(sources, *sides)
    reach = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, geometry.kernel, strict=True)]
    alike = replace(geometry, after=geometry.before)
    covered = ceil and geometry == alike.covered()
    if not (geometry == alike or covered) or any(2 * b > r for b, r in zip(geometry.before, reach, strict=True)):
        raise ValueError("a pooling is padded alike on both sides, by half of its window at most")
    if means and geometry.dilation != (1, 1):
        raise ValueError("means are of windows without holes")
    return geometry


_SIDES = ("kernel", "stride", "before", "after", "dilation")
#: Of each kind of operation the names of its fields, and what makes it of them.
_OPERATIONS: dict[str, tuple[tuple[str, ...], Callable[..., Operation]]] = {
    KINDS[Convolve]: (("weight", "bias", "groups", "attention", *_SIDES), _Decoder.convolve),
    KINDS[Affine]: (("scale", "shift"), _Decoder.affine),
    KINDS[ChannelNorm]: (("scale", "shift", "eps"), _Decoder.channel_norm),
    KINDS[Pooling]: (("average", *_SIDES), _Decoder.pool),
    KINDS[UnevenMean]: (("counts_padding", "divisor", *_SIDES), _Decoder.uneven_mean),
    KINDS[AdaptivePooling]: (("average", "output"), _Decoder.adaptive_pool),
    KINDS[Resize]: (("output", "bilinear", "align_corners", "factors"), _Decoder.resize),
    KINDS[Constant]: (("value",), _Decoder.constant),
    KINDS[Call]: (("function", "kind", "args", "kwargs"), _Decoder.call),
    KINDS[Input]: ((), lambda *_: Input()),
    KINDS[Relu]: ((), lambda *_: Relu()),
    KINDS[Nonlinearity]: (("function", "slope"), _Decoder.nonlinearity),
    KINDS[Select]: (("channels",), _Decoder.select),
    KINDS[Concatenate]: ((), lambda *_: Concatenate()),
    KINDS[Add]: ((), lambda *_: Add()),
    KINDS[Multiply]: ((), lambda *_: Multiply()),
    KINDS[Same]: ((), lambda *_: Same()),
}
