"""From a graph to what a plan's file holds of it: JSON, and tensors by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tkn.plan.form import Form, Slot
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
    UnevenMean,
)
from tkn.plan.nonlinearity import Nonlinearity, Relu

#: The names of operations in files.
KINDS: dict[type, str] = {
    Input: "input",
    Convolve: "convolve",
    Affine: "affine",
    Relu: "relu",
    Nonlinearity: "nonlinearity",
    ChannelNorm: "channel_norm",
    Pooling: "pool",
    UnevenMean: "uneven_mean",
    AdaptivePooling: "adaptive_pool",
    Resize: "resize",
    Concatenate: "concatenate",
    Add: "add",
    Multiply: "multiply",
    Select: "select",
    Same: "same",
    Constant: "constant",
    Call: "call",
}
#: The types of numbers in files, by torch's names.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}


class _NoPlace(Exception):
    """Something for which the format has no place."""


def encoded(graph: Graph) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The nodes as JSON values, and their tensors; ValueError that names all nodes that files can't hold."""
    encoder = _Encoder()
    nodes, refused = [], []
    for position, node in enumerate(graph.nodes):
        try:
            if isinstance(node.operation, Call) and node.operation.overwrites and _is_seen(graph, node.inputs[:1]):
                raise _NoPlace  # what a function writes into its input, a file's function returns
            nodes.append(encoder.node(position, node))
        except _NoPlace:
            assert isinstance(node.operation, Call | Constant)
            refused.append(f"{node.name} ({node.operation.kind})")
    if refused:
        raise ValueError(f"the plan can't be saved: a file can't hold what torch runs in {', '.join(refused)}")
    return nodes, encoder.tensors


def _is_seen(graph: Graph, sources: Iterable[int]) -> bool:
    """Whether others may read the memory of these values, which may be that of what they are made of."""
    return any(
        len(graph.nodes[source].users) > 1
        or source in graph.outputs
        or (isinstance(graph.nodes[source].operation, Call | Same) and _is_seen(graph, graph.nodes[source].inputs))
        for source in sources
    )


def encoded_form(form: Form) -> dict[str, Any]:
    """Its arguments and result as JSON values; ValueError for what files have no place for."""
    encoder = _Encoder()
    try:
        args, kwargs, result = (encoder.argument("", part) for part in (*form.arguments, form.result))
    except _NoPlace:
        raise ValueError(f"the plan can't be saved: a file can't hold what it returns, {form.result!r}") from None
    return {"args": args["tuple"], "kwargs": kwargs["dict"], "result": result}


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def node(self, position: int, node: Node) -> dict[str, Any]:
        return {
            "name": node.name,
            "operation": KINDS[type(node.operation)],
            "inputs": list(node.inputs),
            "size": None if node.size is None else list(node.shape if node.line else node.size),
            "flat": node.flat,
            **self._fields(str(position), node.operation),
        }

    def _fields(self, place: str, operation: Operation) -> dict[str, Any]:
        if isinstance(operation, Convolve):
            bias = None if operation.bias is None else self._tensor(f"{place}.bias", operation.bias)
            return {
                "weight": self._tensor(f"{place}.weight", operation.weight),
                "bias": bias,
                "groups": operation.groups,
                **_geometry(operation),
                "attention": self._attention(place, operation.attention),
            }
        if isinstance(operation, Affine | ChannelNorm):
            eps = {"eps": operation.eps} if isinstance(operation, ChannelNorm) else {}
            return {
                "scale": self._tensor(f"{place}.scale", operation.scale),
                "shift": self._tensor(f"{place}.shift", operation.shift),
                **eps,
            }
        if isinstance(operation, UnevenMean):
            counts = {"counts_padding": operation.counts_padding, "divisor": operation.divisor}
            return {**counts, **_geometry(operation)}
        if isinstance(operation, AdaptivePooling):
            return {"average": operation.average, "output": list(operation.output_size)}
        if isinstance(operation, Resize):
            how = {"bilinear": operation.bilinear, "align_corners": operation.align_corners}
            return {"output": list(operation.output_size), **how, "factors": list(operation.factors)}
        if isinstance(operation, Pooling):
            return {"average": operation.average, **_geometry(operation)}
        if isinstance(operation, Select):
            return {"channels": self._tensor(f"{place}.channels", operation.channels)}
        if isinstance(operation, Nonlinearity) and not isinstance(operation, Relu):
            return {"function": operation.function, "slope": operation.slope}
        if isinstance(operation, Constant):
            return {"value": self._tensor(f"{place}.value", operation.value)}
        if isinstance(operation, Call):
            if operation.name is None:
                raise _NoPlace
            kwargs = {key: value for key, value in operation.kwargs.items() if key != "inplace"}
            return {
                "function": operation.name,
                "kind": operation.kind,
                "args": [self.argument(f"{place}.{index}", value) for index, value in enumerate(operation.args)],
                "kwargs": {key: self.argument(f"{place}.{key}", value) for key, value in kwargs.items()},
            }
        return {}

    def _attention(self, place: str, attention: Attention | None) -> dict[str, Any] | None:
        if attention is None:
            return None
        return {
            "loc": self._tensor(f"{place}.loc", attention.loc),
            "scale": self._tensor(f"{place}.scale", attention.scale),
            "function": attention.function,
            "scale_unit": attention.scale_unit,
            "clip": attention.clip,
        }

    def _tensor(self, name: str, value: Any) -> str:
        """The name under which the tensor is kept: one that is used twice is kept once."""
        if not isinstance(value, Tensor) or value.dtype not in DTYPES.values() or value.layout != torch.strided:
            raise _NoPlace
        known = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride()) if value.numel() else name
        kept = self._names.setdefault((known,), name)
        if kept == name:
            # Numbers of its own: some tensors are parts of others.
            self.tensors[name] = value.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        return kept

    def argument(self, name: str, value: Any) -> Any:
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return value
        if isinstance(value, Slot):
            return {"input": value.index}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(name, value)}
        if isinstance(value, torch.dtype) and value in DTYPES.values():
            return {"dtype": str(value).removeprefix("torch.")}
        if value == torch.device("cpu"):
            return "cpu"
        if value is Ellipsis:
            return {"ellipsis": True}
        if isinstance(value, slice):
            return {"slice": [self.argument(name, part) for part in (value.start, value.stop, value.step)]}
        if type(value) in (list, tuple, torch.Size):
            items = [self.argument(f"{name}.{index}", item) for index, item in enumerate(value)]
            return items if type(value) is list else {"tuple": items}
        if type(value) is dict and all(type(key) is str for key in value):
            return {"dict": {key: self.argument(f"{name}.{key}", item) for key, item in value.items()}}
        raise _NoPlace


def _geometry(operation: Convolve | Pooling | UnevenMean) -> dict[str, list[int]]:
    g = operation.geometry
    sides = {"kernel": g.kernel, "stride": g.stride, "before": g.before, "after": g.after, "dilation": g.dilation}
    return {name: list(both) for name, both in sides.items()}
