"""Computing a graph that may be anyone's, in limited memory: what a node may take is known before it is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from tkn.geometry import pair
from tkn.plan.dense import run_node
from tkn.plan.form import filled
from tkn.plan.graph import Call, Constant, Convolve, Graph, Input
from tkn.plan.parts import Values

#: Bytes for each number that is made, with copies in another layout or type, and for each that is needed beside it.
_MADE_BYTES, _BESIDE_BYTES = 24, 4


class NoRoom(Exception):
    """More memory would be needed than may be taken."""


def guarded(graph: Graph, inputs: Sequence[Tensor], room: int) -> list[Tensor]:
    """The graph's outputs for its inputs [B, ...], in `room` bytes; NoRoom if that may not be enough.

    ValueError if a value is not of its node's size.
    """
    values: Values = dict(enumerate(inputs))
    for position, node in enumerate(graph.nodes):
        if isinstance(node.operation, Input):
            continue
        if sum(map(_bytes, values.values())) + _needed(graph, position, values) > room:
            raise NoRoom
        run_node(graph, position, values)
        if node.size is not None:
            _check_value(values[position], (len(inputs[0]), *node.shape), node.name)
        for done in {position, *node.inputs} - set(graph.outputs):
            if max(graph.nodes[done].users, default=0) <= position:
                del values[done]
    outputs = [values[output] for output in graph.outputs]
    if not all(isinstance(output, Tensor) for output in outputs):
        raise ValueError("an output is no tensor")
    return outputs


def _bytes(value: Any) -> int:
    if isinstance(value, tuple | list):
        return sum(map(_bytes, value))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _check_value(value: Any, shape: tuple[int, ...], name: str) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or tuple(value.shape) != shape:
        raise ValueError(f"{name} is not of the size {list(shape[1:])}")


def _needed(graph: Graph, position: int, values: Values) -> int:
    """How many bytes it takes to compute a node, at most."""
    node = graph.nodes[position]
    operation = node.operation
    inputs = [values[source] for source in node.inputs]
    if isinstance(operation, Constant):
        return 0
    if isinstance(operation, Call):
        args, kwargs = filled((operation.args, operation.kwargs), inputs)
        name = (operation.name or "").split(".")[-1]
        made = _MADE.get(name, _broadcast)(*args, **kwargs)
        return _MADE_BYTES * made + _BESIDE_BYTES * (_BESIDE[name](*args, **kwargs) if name in _BESIDE else 0)
    made, beside = prod(node.shape), 0
    if isinstance(operation, Convolve):
        g = operation.geometry
        channels = operation.weight.shape[1] * operation.groups
        made += channels * prod(n + b + a for n, b, a in zip(g.input_size, g.before, g.after, strict=True))
        beside = channels * g.taps * prod(g.output_size)  # the inputs of every pixel side by side
    return len(inputs[0]) * (_MADE_BYTES * made + _BESIDE_BYTES * beside)


# Of calls: how many numbers they make and need beside these, for their arguments.


def _broadcast(*args: Any, **kwargs: Any) -> int:
    """Of most functions: as many as their tensors have together, stretched as torch does."""
    shapes = [value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    try:
        return prod(torch.broadcast_shapes(*shapes))
    except RuntimeError:  # a weight of each channel: as many as what is weighed
        return max(map(prod, shapes))


def _sum(tensors: Any, *_: Any, **__: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _all_pixels(x: Tensor, padding: Any) -> int:
    """Of a map as large as `padding` makes it: no stride makes that more."""
    axes = x.shape[2:]
    if isinstance(padding, str):
        return prod(axes)
    pads = [padding] * len(axes) if isinstance(padding, int) else padding
    return prod(side + 2 * pad for side, pad in zip(axes, pads, strict=True))


def _padding(bias: Any = None, stride: Any = 1, padding: Any = 0, *_: Any, **__: Any) -> Any:
    """Among a convolution's arguments after its weight."""
    del bias, stride
    return padding


def _convolved(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return len(x) * len(weight) * _all_pixels(x, _padding(*args, **kwargs))


def _convolved_beside(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    """Every output pixel with the inputs of all taps."""
    return len(x) * x.shape[1] * prod(weight.shape[2:]) * _all_pixels(x, _padding(*args, **kwargs))


def _convolved_back(
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> int:
    del bias, padding
    steps, holes, more = pair(stride), pair(dilation), pair(output_padding)
    sides = zip(x.shape[2:], weight.shape[2:], steps, holes, more, strict=True)
    return len(x) * weight.shape[1] * groups * prod(n * s + d * k + m for n, k, s, d, m in sides)


def _convolved_back_beside(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Every input pixel with the outputs of all taps, of at most as many groups as there are inputs."""
    return x.numel() * prod(weight.shape[1:])


def _expanded(x: Tensor, *sizes: Any) -> int:
    flat = sizes[0] if isinstance(sizes[0], list | tuple) else sizes
    return x.numel() * prod(max(1, size) for size in flat)


def _interpolated(x: Tensor, size: Any = None, scale_factor: Any = None, *_: Any, **__: Any) -> int:
    axes = x.shape[2:]
    wanted = scale_factor if size is None else size
    sides = wanted if isinstance(wanted, list | tuple) else [wanted] * len(axes)
    if size is None:
        sides = [min(2**31, own * factor) for own, factor in zip(axes, sides, strict=True)]
    return prod(x.shape[:2]) * prod(int(side) + 1 for side in sides)


def _products(a: Tensor, b: Tensor) -> int:
    return prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))


def _multiplied(a: Tensor, b: Tensor) -> int:
    return _products(a, b) * a.shape[-2:-1].numel() * b.shape[-1]


def _multiplied_beside(a: Tensor, b: Tensor) -> int:
    """Each matrix as often as there are products."""
    return _products(a, b) * (a.shape[-2:].numel() + b.shape[-2:].numel())


def _padded(x: Tensor, pad: Any, *_: Any, **__: Any) -> int:
    shape = list(x.shape)
    for axis, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        shape[-1 - axis] += max(0, before) + max(0, after)
    return prod(shape)


def _pooled(x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *_: Any, **__: Any) -> int:
    """And as many indices."""
    del kernel_size, stride
    return 2 * prod(x.shape[:2]) * _all_pixels(x, padding)


def _pooled_to(x: Tensor, output_size: Any, *_: Any, **__: Any) -> int:
    axes = x.shape[2:]
    sides = output_size if isinstance(output_size, list | tuple) else (output_size,) * len(axes)
    sizes = (own if side is None else side for own, side in zip(axes, sides, strict=True))
    return 2 * prod(x.shape[:2]) * prod(sizes)


#: Where that may be more than the arguments have together.
_MADE: dict[str, Callable[..., int]] = {
    **dict.fromkeys((f"adaptive_{kind}_pool{dims}d" for kind in ("avg", "max") for dims in (1, 2)), _pooled_to),
    **dict.fromkeys((f"{kind}_pool{dims}d" for kind in ("avg", "max") for dims in (1, 2)), _pooled),
    "affine_grid": lambda _, size, *__, **___: 2 * prod(size),
    "bmm": _multiplied,
    "cat": _sum,
    "conv1d": _convolved,
    "conv2d": _convolved,
    "conv_transpose2d": _convolved_back,
    "expand": _expanded,
    "expand_as": lambda x, other: x.numel() * other.numel(),
    "grid_sample": lambda x, grid, *_, **__: x.shape[1] * grid.numel(),
    "interpolate": _interpolated,
    "linear": lambda x, weight, *_, **__: x.numel() // max(1, x.shape[-1]) * len(weight),
    "matmul": _multiplied,
    "pad": _padded,
    "stack": _sum,
}
_BESIDE: dict[str, Callable[..., int]] = {
    "affine_grid": lambda _, size, *__, **___: 3 * prod(size),
    "attend": lambda x, loc, *_, **__: 4 * loc.numel() * prod(x.shape[-2:]),
    "bmm": _multiplied_beside,
    "conv1d": _convolved_beside,
    "conv2d": _convolved_beside,
    "conv_transpose2d": _convolved_back_beside,
    "matmul": _multiplied_beside,
}


def half_of_memory() -> int:
    """Bytes of this machine's memory, halved; 4 GiB where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 2**32
