"""A graph's operations by torch: what runs where there are no kernels, and where these can't be used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.plan.form import filled
from tkn.plan.graph import (
    AdaptivePooling,
    Affine,
    Call,
    ChannelNorm,
    Concatenate,
    Constant,
    Convolve,
    Graph,
    Multiply,
    Node,
    Operation,
    Pooling,
    Resize,
    Same,
    Select,
    UnevenMean,
)
from tkn.plan.nonlinearity import Nonlinearity
from tkn.plan.resampling import resample


def run_node(graph: Graph, position: int, values: dict[int, Any]) -> None:
    """Compute one node, not the input, from the values before it.

    Activations are [B, C, H, W], [B, features] if they are flat, or [B, C, L]. ValueError if one that the node reads
    has another size than the images that the graph was made with gave it.
    """
    node = graph.nodes[position]
    operation = node.operation
    if isinstance(operation, Constant):
        values[position] = operation.value
    elif isinstance(operation, Call):
        inputs = [values[source] for source in node.inputs]
        args, kwargs = filled((operation.args, operation.kwargs), inputs)
        values[position] = operation.function(*args, **kwargs)
    else:
        maps = [as_map(values[source], graph.nodes[source]) for source in node.inputs]
        values[position] = as_torch_sees(_compute(operation, maps), node)


def as_map(x: Tensor, node: Node) -> Tensor:
    """The result of a node as [B, C, H, W]; ValueError if it is of another size."""
    assert node.size is not None
    if x.shape[1:] != node.shape:
        sides = ", ".join(map(str, node.shape))
        raise ValueError(
            f"{node.name} gives {list(x.shape)}, not [B, {sides}]: a plan can't follow sizes that depend on the number "
            "of images"
        )
    # A reshape of one image would change the memory format.
    return x.reshape(-1, *node.size) if node.flat or node.line else x


def as_torch_sees(y: Tensor, node: Node) -> Tensor:
    """The result of a node, a map [B, C, H, W], in the shape that it has in the network."""
    if node.flat:
        return y.flatten(1)
    return y.squeeze(2) if node.line else y


def _compute(operation: Operation, inputs: list[Tensor]) -> Tensor:
    x = inputs[0]
    if isinstance(operation, Convolve):
        return _convolve(operation, x)
    if isinstance(operation, Affine):
        scale, shift = operation.scale.to(x.dtype), operation.shift.to(x.dtype)
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])
    if isinstance(operation, Nonlinearity):
        return operation(x)
    if isinstance(operation, Pooling):
        g = operation.geometry
        if operation.average:
            return F.avg_pool2d(x, g.kernel, g.stride, g.before)
        if g.after != g.before:  # the windows that are more than torch's cover all of the map
            return F.max_pool2d(x, g.kernel, g.stride, g.before, g.dilation, ceil_mode=True)
        return F.max_pool2d(x, g.kernel, g.stride, g.before, g.dilation)
    if isinstance(operation, ChannelNorm):
        scale, shift = operation.scale.to(x.dtype), operation.shift.to(x.dtype)
        return F.layer_norm(x.permute(0, 2, 3, 1), scale.shape, scale, shift, operation.eps).permute(0, 3, 1, 2)
    if isinstance(operation, UnevenMean | AdaptivePooling | Resize):
        return resample(operation, x)
    if isinstance(operation, Concatenate):
        return torch.cat(inputs, dim=1)
    if isinstance(operation, Same):
        return x
    if isinstance(operation, Select):
        return _selected(operation, x)
    return x * inputs[1] if isinstance(operation, Multiply) else x + inputs[1]


def _selected(select: Select, x: Tensor) -> Tensor:
    if select.consecutive is not None:
        return x[:, select.consecutive]
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(3, select.channels).permute(0, 3, 1, 2)
    return x.index_select(1, select.channels)


def is_linear(conv: Convolve) -> bool:
    """Whether it is a fully connected layer."""
    g = conv.geometry
    return g.kernel == g.input_size and g.output_size == (1, 1) and conv.groups == 1 and not any((*g.before, *g.after))


def convolved(conv: Convolve, x: Tensor) -> Tensor:
    """The convolution of maps, without the attention."""
    g = conv.geometry
    x = x.to(conv.weight.dtype)  # in a plan of halves the network's own code may have made it float32
    if is_linear(conv):
        return F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)[:, :, None, None]
    padding = g.before
    if g.before != g.after:
        (top, left), (bottom, right) = g.before, g.after
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    return F.conv2d(x, conv.weight, conv.bias, g.stride, padding, g.dilation, conv.groups)


def _convolve(conv: Convolve, x: Tensor) -> Tensor:
    y = convolved(conv, x)
    if conv.window is not None:
        y = y * conv.window
    return y if conv.mask is None else torch.where(conv.mask, y, 0.0)
