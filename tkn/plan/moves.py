"""Calls that only move numbers, such as views, permutations and chunks: where what they give comes from.

A network spells one thing in many ways: a channel shuffle is three views, a half of the channels a chunk, a slice or a
split. So each such call is made of the indices of an earlier activation's numbers, and what came of them is compared
with what the engine knows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tkn.plan.torch_calls import has_hooks
from tkn.plan.trace import BATCHES, Seen

_METHODS = """
    chunk contiguous flatten movedim narrow permute reshape split squeeze swapaxes swapdims t tensor_split transpose
    unflatten unsqueeze view
"""
_FUNCTIONS: dict[Hashable, str] = {getattr(torch, name): name for name in _METHODS.split() if hasattr(torch, name)}
_MODULES = (nn.ChannelShuffle, nn.Flatten, nn.Unflatten)


@dataclass(frozen=True, eq=False)
class Moved:
    """Numbers of an activation: `base`, and for both of the batches which they are in it, the first being 0."""

    base: fx.Node
    indices: tuple[Any, Any]


def insert_numbers(graph: fx.Graph, one: dict[fx.Node, Seen], other: dict[fx.Node, Seen]) -> None:
    """Put numbers that are the same for all batches, which are sides of activations and what is computed of them, in
    the place of the calls that compute them."""
    known: dict[fx.Node, Any] = {}
    for n in graph.nodes:
        n.args = fx.map_arg(n.args, lambda source: known.get(source, source))
        n.kwargs = fx.map_arg(n.kwargs, lambda source: known.get(source, source))
        value = one[n].value if n in one else None
        if value is None or value != other[n].value:
            continue
        # Another number might be the same for these two batches by chance.
        if all(_is_shape_of(n, source, one, other) for source in n.all_input_nodes):
            known[n] = tuple(value) if isinstance(value, tuple) else value
    for n in reversed(graph.nodes):
        if n in known:
            graph.erase_node(n)


def _is_shape_of(n: fx.Node, source: fx.Node, one: dict[fx.Node, Seen], other: dict[fx.Node, Seen]) -> bool:
    """Whether n is how many axes a tensor has, or a side, or several, of an activation or of a constant."""
    if one[source].kind is Tensor:
        name = n.args[1] if n.target is getattr else n.target
        batches = one[source].shape[:1], other[source].shape[:1]
        return name in ("dim", "ndim") or (
            name in ("size", "shape") and (source.op == "get_attr" or batches == (BATCHES[:1], BATCHES[1:]))
        )
    of_shape = n.target is operator.getitem and one[source].kind is torch.Size
    return of_shape and all(_is_shape_of(source, of, one, other) for of in source.all_input_nodes)


def moves(
    traced: fx.GraphModule, one: dict[fx.Node, Seen], other: dict[fx.Node, Seen], written: Iterable[fx.Node]
) -> dict[fx.Node, Moved]:
    """The values that are only moved, but for those of what is `written` over later: they are views of it."""
    found: dict[fx.Node, Moved] = {}
    counts: dict[tuple[int, ...], Tensor] = {}  # of shapes: most are those of several values
    for n in traced.graph.nodes:
        function = _function(n, traced)
        if function is None or not n.args or not isinstance(n.args[0], fx.Node):
            continue
        source = found.get(n.args[0])
        if source is None:
            shapes = [seen[n.args[0]].shape for seen in (one, other)]
            if not all(shapes):
                continue
            first, second = (counts.setdefault(shape, _count_up(shape)) for shape in shapes)
            source = Moved(n.args[0], (first, second))
        made = [
            _made(n, function, index, seen, prod(seen[source.base].shape[1:]))
            for seen, index in zip((one, other), source.indices, strict=True)
        ]
        if all(index is not None for index in made):
            found[n] = Moved(source.base, (made[0], made[1]))
    overwritten = {found[n].base if n in found else n for n in written}
    return {n: moved for n, moved in found.items() if moved.base not in overwritten}


def _made(n: fx.Node, function: Callable[..., Any], index: Any, seen: dict[fx.Node, Seen], image: int) -> Any:
    """What a call makes of an index, in which each image has so many numbers; None if that is not what was seen, or
    depends on how many images there are."""
    values: dict[fx.Node, Any] = {source: seen[source].value for source in n.all_input_nodes}
    values[n.all_input_nodes[0]] = index
    args: Any = fx.map_arg(n.args, values.__getitem__)
    kwargs: Any = fx.map_arg(n.kwargs, values.__getitem__)
    try:
        if isinstance(index, Tensor):
            for axis in _cut_axes(n, *args, **kwargs):
                if not torch.equal(index // image, (index // image).narrow(axis, 0, 1).expand_as(index)):
                    return None  # images lie along it
        made = function(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return None
    return made if _is_seen(made, seen[n]) else None


def _cut_axes(n: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Iterator[int]:
    """The axes of which a call may leave out some numbers, or all that there are."""
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    if n.target is operator.getitem:
        items = args[0] if isinstance(args[0], tuple) else (args[0],)
        axis = 0
        for place, item in enumerate(items):
            if item is Ellipsis:
                axis = x.dim() - sum(after is not None for after in items[place + 1 :])
            elif item is not None:
                if item != slice(None):
                    yield axis
                axis += 1
    elif name == "narrow":
        yield kwargs["dim"] if "dim" in kwargs else args[0]
    elif name in ("chunk", "split", "tensor_split"):
        yield kwargs["dim"] if "dim" in kwargs else (*args, 0, 0)[1]
    elif name == "squeeze":
        axes = kwargs["dim"] if "dim" in kwargs else args[0] if args else range(x.dim())
        yield from (axes,) if isinstance(axes, int) else axes


def _count_up(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(prod(shape), dtype=torch.int32, device="cpu").reshape(shape)


def _is_seen(made: Any, seen: Seen) -> bool:
    if isinstance(made, Tensor):
        return seen.kind is Tensor and tuple(made.shape) == seen.shape
    return isinstance(made, list | tuple) and issubclass(seen.kind, list | tuple)


def _function(n: fx.Node, traced: fx.GraphModule) -> Callable[..., Any] | None:
    """What moves numbers as n does."""
    if n.op == "call_module":
        module = traced.get_submodule(str(n.target))
        return module if type(module) in _MODULES and not has_hooks(module) else None
    if n.target is operator.getitem:
        return operator.getitem
    if n.target in (torch.channel_shuffle, F.channel_shuffle):
        return torch.channel_shuffle
    name = n.target if n.op == "call_method" else _FUNCTIONS.get(n.target) if isinstance(n.target, Hashable) else None
    if name not in _METHODS.split():
        return None
    name = "reshape" if name == "view" else name  # of tensors in another memory format

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, str(name))(*args, **kwargs)

    return call


@dataclass(frozen=True, eq=False)
class Selection:
    """What was moved is the `channels` of a map, for torch with the channels `last`, or `flat`."""

    channels: Tensor
    last: bool = False
    flat: bool = False


def selection(moved: Moved, size: tuple[int, int, int], *, last: bool, line: bool) -> Selection | None:
    """What is moved from a map of `size`, which is [B, C, H, W], or with its channels `last`, or flat; or a `line`,
    [B, C, L]."""
    found = [_selected(index, size, last=last, line=line) for index in moved.indices]
    first, second = found
    if first is None or second is None or (first.last, first.flat) != (second.last, second.flat):
        return None
    return first if torch.equal(first.channels, second.channels) else None


def is_pixels(moved: Moved, size: tuple[int, int, int]) -> bool:
    """Whether what is moved from a map [B, C, H, W] is the same as [B, C, H W]."""
    return all(
        isinstance(index, Tensor) and torch.equal(index, _count_up((len(index), *size)).flatten(2))
        for index in moved.indices
    )


def _selected(index: Any, size: tuple[int, int, int], *, last: bool, line: bool) -> Selection | None:
    if not isinstance(index, Tensor) or index.dim() not in (2, 3 if line else 4) or index.numel() == 0:
        return None
    channels, height, width = size
    batch = len(index)
    count = _count_up((batch, height, width, channels)).permute(0, 3, 1, 2) if last else _count_up((batch, *size))
    if index.dim() == 2:
        if torch.equal(index, count.flatten(1)):
            return Selection(torch.arange(channels, device="cpu"), flat=True)
        if (height, width) != (1, 1):
            return None
        chosen = _chosen(index[:, :, None, None], count)
        return None if chosen is None else Selection(chosen, flat=True)
    if line:
        chosen = _chosen(index.unsqueeze(2), count)
        return None if chosen is None else Selection(chosen)
    for put_last, as_map in ((False, index), (True, index.permute(0, 3, 1, 2))):
        chosen = _chosen(as_map, count)
        if chosen is not None:
            return Selection(chosen, last=put_last)
    return None


def _chosen(index: Tensor, count: Tensor) -> Tensor | None:
    """The channels of `count` [B, C, H, W], in each channel ascending, that `index` [B, C', H, W] is."""
    if index.shape[2:] != count.shape[2:]:
        return None
    channels = torch.searchsorted(count[0, :, 0, 0].contiguous(), index[0, :, 0, 0].contiguous())
    channels = channels.clamp(max=count.shape[1] - 1)
    return channels if torch.equal(count[:, channels], index) else None
