"""Computing a graph that may be anyone's, in limited memory: what a node may take is known before it is computed."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from tkn.geometry import pair
from tkn.plan.dense import filled, run_node
from tkn.plan.graph import Call, Constant, Convolve, Graph, Input
from tkn.plan.parts import Values, torch_shape

#: Copies that torch makes of what it computes, in another layout or type: bytes for each number.
_COPIES = 24


class NoRoom(Exception):
    """More memory would be needed than may be taken."""


def guarded(graph: Graph, images: Tensor, room: int) -> Tensor:
    """The graph's output for images [B, C, H, W], in `room` bytes; NoRoom if that may not be enough.

    ValueError if a value is not of its node's size.
    """
    values: Values = {0: images}
    for position, node in enumerate(graph.nodes):
        if isinstance(node.operation, Input):
            continue
        if sum(map(_bytes, values.values())) + _COPIES * _numbers(graph, position, values) > room:
            raise NoRoom
        run_node(graph, position, values)
        if node.size is not None:
            _check_value(values[position], (len(images), *torch_shape(graph, position)), node.name)
        for done in {position, *node.inputs} - {graph.output}:
            if max(graph.nodes[done].users, default=0) <= position:
                del values[done]
    output = values[graph.output]
    if not isinstance(output, Tensor):
        raise ValueError("the output is no tensor")
    return output


def _bytes(value: Any) -> int:
    if isinstance(value, tuple | list):
        return sum(map(_bytes, value))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _check_value(value: Any, shape: tuple[int, ...], name: str) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or tuple(value.shape) != shape:
        raise ValueError(f"{name} is not of the size {list(shape[1:])}")


def _numbers(graph: Graph, position: int, values: Values) -> int:
    """How many numbers a node makes, and those beside them, at most."""
    node = graph.nodes[position]
    operation = node.operation
    inputs = [values[source] for source in node.inputs]
    if isinstance(operation, Constant):
        return 0
    if isinstance(operation, Call):
        args, kwargs = filled((operation.args, operation.kwargs), inputs)
        name = (operation.name or "").split(".")[-1]
        return _made_by_call(name, args, kwargs)
    images, made = len(inputs[0]), prod(torch_shape(graph, position))
    if isinstance(operation, Convolve):
        g = operation.geometry
        padded = prod(n + b + a for n, b, a in zip(g.input_size, g.before, g.after, strict=True))
        channels = operation.weight.shape[1] * operation.groups
        made += channels * (padded + g.taps * prod(g.output_size))  # the inputs of every pixel side by side
    return images * made


def _made_by_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    if name in _MADE:
        return _MADE[name](*args, **kwargs)
    shapes = [value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    try:
        return prod(torch.broadcast_shapes(*shapes))
    except RuntimeError:  # a weight of each channel, for one: as large as what is weighed
        return max(map(prod, shapes))


def _attend(x: Tensor, loc: Tensor, *_: Any, **__: Any) -> int:
    return x.numel() + loc.numel() * x.shape[-2] * x.shape[-1]


def _cat(tensors: Any, *_: Any, **__: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    *_: Any,
    **__: Any,
) -> int:
    """Every output pixel with the inputs of all taps; no more pixels than without a stride."""
    del bias, stride
    axes = x.shape[2:]
    padding = 0 if isinstance(padding, str) else padding
    pads = [padding] * len(axes) if isinstance(padding, int) else [*padding, *padding]
    pixels = prod(side + 2 * pad for side, pad in zip(axes, pads, strict=False))
    return len(x) * pixels * (len(weight) + x.shape[1] * prod(weight.shape[2:]))


def _convolved_back(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> int:
    del bias, padding
    steps, holes, more = pair(stride), pair(dilation), pair(output_padding)
    sides = zip(x.shape[2:], weight.shape[2:], steps, holes, more, strict=True)
    pixels = prod(n * s + d * k + m for n, k, s, d, m in sides)
    outputs = weight.shape[1] * groups
    return len(x) * outputs * (pixels + prod(weight.shape[2:]) * prod(x.shape[2:]))


def _expanded(x: Tensor, *sizes: Any) -> int:
    flat = sizes[0] if isinstance(sizes[0], list | tuple) else sizes
    return x.numel() * prod(max(1, size) for size in flat)


def _interpolated(x: Tensor, size: Any = None, scale_factor: Any = None, *_: Any, **__: Any) -> int:
    axes = x.dim() - 2
    wanted = scale_factor if size is None else size
    factors = wanted if isinstance(wanted, list | tuple) else [wanted] * axes
    made = prod(max(1, factor) for factor in factors)
    return int(min(1e18, prod(x.shape[:2]) * made * (1 if size is not None else prod(x.shape[2:]))))


def _matrices(a: Tensor, b: Tensor) -> int:
    """Each of the products, and each matrix as often as there are products."""
    products = prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    rows, columns = a.shape[-2:].numel(), b.shape[-2:].numel()
    return products * (rows * b.shape[-1] + rows + columns)


def _padded(x: Tensor, pad: Any, *_: Any, **__: Any) -> int:
    shape = list(x.shape)
    for axis, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        shape[-1 - axis] += max(0, before) + max(0, after)
    return prod(shape)


def _pooled(x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *_: Any, **__: Any) -> int:
    """No more pixels than without a stride, and as many indices."""
    del kernel_size, stride
    return 2 * prod(x.shape[:-2]) * prod(side + 2 * pad for side, pad in zip(x.shape[-2:], pair(padding), strict=True))


def _pooled_to(x: Tensor, output_size: Any, *_: Any, **__: Any) -> int:
    sides = output_size if isinstance(output_size, list | tuple) else (output_size, output_size)
    sizes = (own if side is None else side for own, side in zip(x.shape[-2:], sides, strict=True))
    return 2 * prod(x.shape[:-2]) * prod(sizes)


#: Of functions that may make more than their largest input: how many numbers, for their arguments.
_MADE: dict[str, Callable[..., int]] = {
    "adaptive_avg_pool2d": _pooled_to,
    "adaptive_max_pool2d": _pooled_to,
    "affine_grid": lambda _, size, *__, **___: 6 * prod(size),
    "attend": _attend,
    "avg_pool2d": _pooled,
    "bmm": _matrices,
    "cat": _cat,
    "conv1d": _convolved,
    "conv2d": _convolved,
    "conv_transpose2d": _convolved_back,
    "expand": _expanded,
    "expand_as": lambda x, other: x.numel() * other.numel(),
    "grid_sample": lambda x, grid, *_, **__: x.shape[1] * grid.numel(),
    "interpolate": _interpolated,
    "linear": lambda x, weight, *_, **__: x.numel() // max(1, x.shape[-1]) * len(weight),
    "matmul": _matrices,
    "max_pool2d": _pooled,
    "pad": _padded,
    "stack": _cat,
}
