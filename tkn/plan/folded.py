"""A graph as torch computes it fastest: normalisations and nonlinearities are part of the convolutions before them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.plan.dense import as_map, as_torch_sees, convolved, is_linear
from tkn.plan.form import Slot
from tkn.plan.graph import Affine, Call, Convolve, Graph, Node
from tkn.plan.nonlinearity import Nonlinearity, Relu


@dataclass(eq=False)
class FoldedConvolve:
    """function(factor * convolution + shift), the convolution only where `mask` is true.

    `conv`: without attention; where there is no factor, a normalisation is in its weights already. `factor`, `mask`:
    [O, H, W]; `shift`: [O, 1, 1]; `source`: what gives the inputs; `result`: what this computes all of.
    """

    conv: Convolve
    source: Node
    result: Node
    factor: Tensor | None
    shift: Tensor | None
    mask: Tensor | None
    function: Nonlinearity | None

    def __call__(self, x: Tensor) -> Tensor:
        y = convolved(self.conv, as_map(x, self.source))  # memory of its own, which may be written to
        if self.factor is not None:
            y = y.mul_(self.factor) if self.shift is None else torch.addcmul(self.shift, y, self.factor)
        if self.mask is not None:
            y = torch.where(self.mask, y, 0.0 if self.shift is None else self.shift)
        if self.function is not None:
            y = F.relu_(y) if isinstance(self.function, Relu) else self.function(y)
        return as_torch_sees(y, self.result)


def folded(graph: Graph, *, channels_last: bool) -> Graph:
    """The same results by fewer passes over memory; `channels_last`: the format that convolutions write."""
    nodes: list[Node] = []
    place: dict[int, int] = {}  # of the old nodes' results among the new ones
    for position, node in enumerate(graph.nodes):
        if position in place:
            continue
        done, operation = [position], node.operation
        if isinstance(operation, Convolve):
            for kind in (Affine, Nonlinearity):
                follows = _only_user(graph, done[-1])
                if follows is not None and isinstance(graph.nodes[follows].operation, kind):
                    done.append(follows)
            operation = _call(graph, done, operation, channels_last=channels_last)
        inputs = tuple(place[source] for source in node.inputs)
        last = graph.nodes[done[-1]]
        place.update(dict.fromkeys(done, len(nodes)))
        nodes.append(Node(node.name, operation, inputs, last.size, last.flat, last.line))
    return Graph(nodes, [place[output] for output in graph.outputs], graph.form)


def _only_user(graph: Graph, position: int) -> int | None:
    users = graph.nodes[position].users
    return users[0] if len(users) == 1 and position not in graph.outputs else None


def _call(graph: Graph, done: list[int], conv: Convolve, *, channels_last: bool) -> Call:
    """A convolution with all that is `done`."""
    operations = [graph.nodes[position].operation for position in done]
    affine = next((operation for operation in operations if isinstance(operation, Affine)), None)
    function = next((operation for operation in operations if isinstance(operation, Nonlinearity)), None)
    weight, bias, factor, shift = conv.weight, conv.bias, conv.window, None
    if affine is not None and factor is None:
        scale = affine.scale.double()
        weight = (weight.double() * scale[:, None, None, None]).to(weight.dtype)
        bias = (affine.shift + (0.0 if bias is None else bias.double() * scale)).to(weight.dtype)
    elif affine is not None and factor is not None:
        factor = (factor.double() * affine.scale[:, None, None]).to(weight.dtype)
        shift = affine.shift.to(weight.dtype)[:, None, None]
    mask = conv.mask
    if channels_last and not is_linear(conv):
        weight = _channels_last(weight)
        factor = None if factor is None else _channels_last(factor)
        mask = None if mask is None else _channels_last(mask)
    source = graph.nodes[graph.nodes[done[0]].inputs[0]]
    plain = Convolve(weight, bias, conv.geometry, conv.groups)
    convolve = FoldedConvolve(plain, source, graph.nodes[done[-1]], factor, shift, mask, function)
    return Call(convolve, (Slot(0),), {}, "convolution")


def _channels_last(tensor: Tensor) -> Tensor:
    """[O, C, H, W], or [O, H, W] of a map, in that format."""
    return tensor.reshape(-1, *tensor.shape[-3:]).contiguous(memory_format=torch.channels_last)
