"""The sizes of what the engine's operations make of activations, before anything is computed."""

from __future__ import annotations

from math import floor, prod

from tkn.geometry import Geometry, pair
from tkn.plan.graph import (
    AdaptivePooling,
    Add,
    Affine,
    ChannelNorm,
    Concatenate,
    Convolve,
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

#: No activation of one image may have more numbers.
_MOST_NUMBERS = 2**30


def result_size(node: Node, sources: list[Node]) -> Size:
    """Of a node that the engine knows; ValueError if its operation does not fit its `sources`.

    Of `node` the size itself is not read, but for the input's.
    """
    operation = node.operation
    if isinstance(operation, Input):
        if node.size is None or sources or (node.flat and node.size[1:] != (1, 1)):
            raise ValueError("an input is images or vectors")
        return node.size
    sizes = [source.size for source in sources]
    if None in sizes:
        raise ValueError("its input is no activation")
    known = [size for size in sizes if size is not None]
    _check_number_of_inputs(operation, known)
    flats = {source.flat for source in sources}
    size = known[0]
    if {source.line for source in sources} != {node.line} and not node.flat:
        raise ValueError("maps of one row stay such, and others do not become them")
    if isinstance(operation, Convolve):
        return _convolved(operation, size, sources[0].flat, node.flat)
    if isinstance(operation, Pooling | UnevenMean | AdaptivePooling | Resize):
        output = _resampled(operation, size)
        if flats != {False} or (node.flat and output != (1, 1)):
            raise ValueError("a pooling is of maps")
        return (size[0], *output)
    if isinstance(operation, Same):
        return size
    if flats != {node.flat}:
        raise ValueError("it neither flattens nor unflattens")
    if isinstance(operation, ChannelNorm) and node.flat and size[1:] != (1, 1):
        raise ValueError("it normalises the channels of pixels")
    if isinstance(operation, Affine | ChannelNorm):
        if operation.scale.shape != size[:1] or operation.shift.shape != size[:1]:
            raise ValueError(f"scale and shift must have {size[0]} numbers")
    elif isinstance(operation, Select):
        return _selected(operation, size, node.flat)
    elif isinstance(operation, Concatenate):
        if len({other[1:] for other in known}) > 1:
            raise ValueError("it joins maps of one height and width")
        return (sum(other[0] for other in known), *size[1:])
    elif isinstance(operation, Add) and len(set(known)) > 1:
        raise ValueError("it adds maps of one size")
    elif isinstance(operation, Multiply) and known[1] not in (size, (size[0], 1, 1)):
        raise ValueError("it multiplies maps of one size, or one with a number for each channel")
    return size


def _check_number_of_inputs(operation: Operation, sizes: list[Size]) -> None:
    wanted = 2 if isinstance(operation, Add | Multiply) else 1
    if len(sizes) < wanted or (len(sizes) > wanted and not isinstance(operation, Concatenate)):
        raise ValueError(f"it has {len(sizes)} inputs")


def _resampled(operation: Pooling | UnevenMean | AdaptivePooling | Resize, size: Size) -> tuple[int, int]:
    if isinstance(operation, Pooling | UnevenMean):
        return _checked_output(operation.geometry, size)
    output = operation.output_size
    _check_count((size[0], *output))
    if isinstance(operation, Resize):
        for own, side, factor in zip(size[1:], output, operation.factors, strict=True):
            if factor is not None and floor(min(own * factor, 2.0**31)) != side:
                raise ValueError(f"a side of {own} pixels times {factor} is not {side}")
    return output


def _selected(select: Select, size: Size, flat: bool) -> Size:
    channels = select.channels
    if channels.dim() != 1 or len(channels) == 0 or channels.min() < 0 or channels.max() >= size[0]:
        raise ValueError(f"it selects others than {size[0]} channels")
    if flat and size[1:] != (1, 1):
        raise ValueError("a flat map's channels are selected together")
    _check_count((len(channels), *size[1:]))
    return (len(channels), *size[1:])


def _convolved(conv: Convolve, size: Size, source_flat: bool, flat: bool) -> Size:
    geometry, (outputs, per_group, *kernel) = conv.geometry, conv.weight.shape
    if tuple(kernel) != geometry.kernel or size[0] != per_group * conv.groups or outputs % conv.groups:
        raise ValueError(
            f"a weight of {list(conv.weight.shape)} in {conv.groups} groups does not fit {size[0]} channels"
        )
    if source_flat != flat or (flat and geometry != Geometry(size[1:], size[1:])):
        raise ValueError("a flat map is convolved as a whole")
    if conv.bias is not None and conv.bias.shape != (outputs,):
        raise ValueError(f"the bias must have {outputs} numbers")
    attention = conv.attention
    if attention is not None and not attention.loc.shape == attention.scale.shape == (2, outputs):
        raise ValueError(f"loc and scale must be [2, {outputs}]")
    return (outputs, *_checked_output(geometry, size))


def _checked_output(geometry: Geometry, size: Size) -> tuple[int, int]:
    if geometry.input_size != size[1:] or min(geometry.output_size) < 1:
        raise ValueError(f"windows of {geometry.kernel} pixels do not fit a map of {size[1:]}")
    _check_count((size[0], *(n + b + a for n, b, a in zip(size[1:], geometry.before, geometry.after, strict=True))))
    return pair(geometry.output_size)


def _check_count(shape: tuple[int, ...]) -> None:
    if prod(shape) > _MOST_NUMBERS:
        raise ValueError(f"a map of {list(shape)} numbers is too large")
