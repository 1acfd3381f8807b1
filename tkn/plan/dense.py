"""A graph's operations by torch: what runs where there are no kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.plan.graph import Affine, Concatenate, Convolve, Graph, Node, Pooling, Relu, Same


def run_dense(graph: Graph, position: int, values: dict[int, Any]) -> None:
    """Compute one node, not a `Torch` one, from the values before it: [B, C, H, W], or [B, features] if it is flat."""
    node = graph.nodes[position]
    inputs = [_as_map(values[source], graph.nodes[source]) for source in node.inputs]
    result = _compute(node.operation, inputs)
    values[position] = result.flatten(1) if node.flat else result


def _as_map(x: Tensor, node: Node) -> Tensor:
    assert node.size is not None
    return x.reshape(-1, *node.size)


def _compute(operation: object, inputs: list[Tensor]) -> Tensor:
    x = inputs[0]
    if isinstance(operation, Convolve):
        return _convolve(operation, x)
    if isinstance(operation, Affine):
        scale, shift = operation.scale.to(x.dtype), operation.shift.to(x.dtype)
        return x * scale[:, None, None] + shift[:, None, None]
    if isinstance(operation, Relu):
        return F.relu(x)
    if isinstance(operation, Pooling):
        g = operation.geometry
        if operation.average:
            return F.avg_pool2d(x, g.kernel, g.stride, g.before)
        return F.max_pool2d(x, g.kernel, g.stride, g.before, g.dilation)
    if isinstance(operation, Concatenate):
        return torch.cat(inputs, dim=1)
    if isinstance(operation, Same):
        return x
    return x + inputs[1]


def _convolve(conv: Convolve, x: Tensor) -> Tensor:
    (top, left), (bottom, right) = conv.geometry.before, conv.geometry.after
    y = F.conv2d(
        F.pad(x, (left, right, top, bottom)),
        conv.weight,
        conv.bias,
        stride=conv.geometry.stride,
        dilation=conv.geometry.dilation,
        groups=conv.groups,
    )
    if conv.window is not None:
        y = y * conv.window
    return y if conv.mask is None else torch.where(conv.mask, y, 0.0)
