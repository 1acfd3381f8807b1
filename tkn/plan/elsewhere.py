"""A graph on another device, or with weights of another type; what torch computes of it there."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tkn.plan.graph import (
    AdaptivePooling,
    Affine,
    Call,
    ChannelNorm,
    Constant,
    Convolve,
    Graph,
    Multiply,
    Node,
    Operation,
    Resize,
    Select,
    UnevenMean,
)
from tkn.plan.nonlinearity import Nonlinearity, Relu

#: What only the CPU's kernels know.
_ON_CPUS = (Multiply, ChannelNorm, UnevenMean, AdaptivePooling, Resize)


def left_to_torch(node: Node) -> bool:
    """Whether only torch computes it on a GPU, where the kernels know no other function than ReLU."""
    other = isinstance(node.operation, Nonlinearity) and not isinstance(node.operation, Relu)
    return node.by_torch or other or isinstance(node.operation, _ON_CPUS)


def moved(graph: Graph, device: torch.device, dtype: torch.dtype) -> Graph:
    """The same operations on a device, with weights of `dtype`."""
    return graph.with_operations(_moved(node.operation, device, dtype) for node in graph.nodes)


def _moved(operation: Operation, device: torch.device, dtype: torch.dtype) -> Operation:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, dict):
            return {key: move(part) for key, part in value.items()}
        return type(value)(map(move, value)) if type(value) in (list, tuple) else value

    made = copy.copy(operation)
    if isinstance(made, Convolve):
        made.weight, made.bias = move(made.weight), move(made.bias)
        # Windows and masks are kept beside what they were made of.
        for name in ("window", "mask"):
            made.__dict__[name] = move(getattr(operation, name))
    elif isinstance(made, Affine | ChannelNorm):
        made.scale, made.shift = made.scale.to(device), made.shift.to(device)
    elif isinstance(made, Select):
        made.channels = move(made.channels)
    elif isinstance(made, Constant):
        made.value = move(made.value)
    elif isinstance(made, Call):
        made.args, made.kwargs = move(made.args), move(made.kwargs)
        if isinstance(made.function, nn.Module):
            made.function = copy.deepcopy(made.function).to(device, dtype)
    return made
