"""A graph of which the kernels compute some parts, and torch those that it computes faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from math import prod

from tkn.plan.folded import folded
from tkn.plan.form import Form, Slot
from tkn.plan.graph import Affine, Convolve, Graph, Input, Node, Pooling, Same
from tkn.plan.nonlinearity import Nonlinearity
from tkn.plan.parts import KernelPart, Part, PartCosts, Program, Values

#: A run of nodes is parted into so many pieces at most.
_PIECES = 8
#: Torch has to be so much faster: a map goes through memory on the way to the kernels and back.
_FASTER = 0.95


class FoldedPart(Part):
    """Nodes by torch, normalisations and functions folded into the convolutions before them."""

    def __init__(self, graph: Graph, nodes: list[int], *, channels_last: bool) -> None:
        super().__init__(graph, nodes)
        self._program = Program.by_torch(folded(_own_graph(graph, self), channels_last=channels_last))

    def run(self, values: Values) -> None:
        results = self._program.outputs(*(values[position] for position in self.inputs))
        values.update(zip(self.outputs, results, strict=True))


def _own_graph(graph: Graph, part: Part) -> Graph:
    """A part's nodes as a graph of its inputs."""
    place = {position: index for index, position in enumerate((*part.inputs, *part.nodes))}
    nodes = []
    for position in place:
        node = graph.nodes[position]
        if position in part.inputs:
            nodes.append(replace(node, operation=Input(), inputs=()))
        else:
            nodes.append(replace(node, inputs=tuple(place[source] for source in node.inputs)))
    arguments, result = (tuple(map(Slot, range(len(ends)))) for ends in (part.inputs, part.outputs))
    return Graph(nodes, [place[position] for position in part.outputs], Form((arguments, {}), result))


def mixed(
    program: Program, make: Callable[[list[int]], KernelPart], seconds: Callable[[Part], float], *, channels_last: bool
) -> tuple[Program | None, list[PartCosts]]:
    """`program`, of the kernels, with the pieces that torch computes faster left to it; and these with what they cost.

    None if torch computes none of the pieces faster, or all of them. `make`: a part of nodes by the kernels; `seconds`:
    of a part; `channels_last`: torch's format.
    """
    parts: list[Part] = []
    left: list[PartCosts] = []
    kept = False
    for part in program.parts:
        if not isinstance(part, KernelPart):
            parts.append(part)
            continue
        choices: list[tuple[list[int], Part | None]] = []
        for piece in _pieces(program.graph, part):
            by_torch = FoldedPart(program.graph, piece, channels_last=channels_last)
            costs = seconds(make(piece)), seconds(by_torch)
            slower = costs[1] < _FASTER * costs[0]
            choices.append((piece, by_torch if slower else None))
            if slower:
                first, last = (program.graph.nodes[position].name for position in (piece[0], piece[-1]))
                left.append(PartCosts(first, last, *costs))
        for by_kernels, pieces in groupby(choices, lambda choice: choice[1] is None):
            if by_kernels:
                kept = True
                parts.append(make([position for piece, _ in pieces for position in piece]))
            else:
                parts.extend(by_torch for _, by_torch in pieces if by_torch is not None)
    return (Program(program.graph, parts, f"{program.way}, parts by torch") if left and kept else None), left


def _pieces(graph: Graph, part: Part) -> Iterator[list[int]]:
    """A part's nodes, parted where one activation alone goes on, in about equal shares of multiply-adds."""
    work = [_macs(graph.nodes[position]) for position in part.nodes]
    share = sum(work) / _PIECES
    last = {position: max(graph.nodes[position].users, default=position) for position in (*part.inputs, *part.nodes)}
    piece: list[int] = []
    done = 0.0
    for position, macs in zip(part.nodes, work, strict=True):
        piece.append(position)
        done += macs
        alone = all(source == position or last[source] <= position for source in last if source <= position)
        if alone and done >= share and position != part.nodes[-1] and not _joined(graph, position):
            yield piece
            piece, done = [], 0.0
    yield piece


def _joined(graph: Graph, position: int) -> bool:
    """Whether what reads it would be part of it."""
    readers = (graph.nodes[user].operation for user in graph.nodes[position].users)
    return any(isinstance(reader, Affine | Nonlinearity | Pooling | Same) for reader in readers)


def _macs(node: Node) -> int:
    conv = node.operation
    if not isinstance(conv, Convolve):
        return 0
    return conv.weight.numel() * prod(conv.geometry.output_size)
