"""The parts of a plan: how runs of nodes are computed, by the engine in either layout, or by torch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tkn.backends.cpu.build import kernels
from tkn.backends.cpu.structs import InstructionStruct, StepStruct
from tkn.plan.dense import run_dense
from tkn.plan.graph import Graph, Input, Slot, Torch
from tkn.plan.lower_maps import MapLowering
from tkn.plan.lower_rows import RowLowering


class Part(Protocol):
    """Nodes that run in one go."""

    def run(self, graph: Graph, values: dict[int, Any]) -> None:
        """Compute the nodes' values from those of earlier ones."""


@dataclass
class DensePart:
    """Nodes that the engine knows, by torch."""

    nodes: list[int]

    def run(self, graph: Graph, values: dict[int, Any]) -> None:
        for position in self.nodes:
            run_dense(graph, position, values)


def by_torch(graph: Graph, nodes: list[int]) -> Part:
    """One of `split`'s parts without the engine."""
    return TorchPart(nodes[0]) if isinstance(graph.nodes[nodes[0]].operation, Torch) else DensePart(nodes)


@dataclass
class TorchPart:
    """A node that torch runs."""

    position: int

    def run(self, graph: Graph, values: dict[int, Any]) -> None:
        node = graph.nodes[self.position]
        assert isinstance(node.operation, Torch)
        inputs = [values[source] for source in node.inputs]
        args, kwargs = _filled((node.operation.args, node.operation.kwargs), inputs)
        values[self.position] = node.operation.function(*args, **kwargs)


def _filled(arguments: Any, inputs: list[Any]) -> Any:
    if isinstance(arguments, Slot):
        return inputs[arguments.index]
    if isinstance(arguments, dict):
        return {key: _filled(value, inputs) for key, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        return type(arguments)(_filled(value, inputs) for value in arguments)
    return arguments


class _Engine:
    """Nodes that the engine runs in one go."""

    def __init__(self, graph: Graph, nodes: list[int]) -> None:
        own = set(nodes)
        self.inputs = sorted({s for n in nodes for s in graph.nodes[n].inputs} - own)
        self.outputs = [n for n in nodes if n == graph.output or set(graph.nodes[n].users) - own]
        self.memory = torch.empty(0, dtype=torch.float32)

    def run(self, graph: Graph, values: dict[int, Any]) -> None:
        dense = []
        for position in self.inputs:
            size = graph.nodes[position].size
            assert size is not None
            dense.append(values[position].contiguous().view(-1, *size))
        images = len(dense[0])
        for position in self.outputs:
            size = graph.nodes[position].size
            assert size is not None
            dense.append(torch.empty(images, *size, dtype=torch.float32))
        self._compute(images, (c_void_p * len(dense))(*(tensor.data_ptr() for tensor in dense)))
        for position, tensor in zip(self.outputs, dense[len(self.inputs) :], strict=True):
            values[position] = tensor.view(images, -1) if graph.nodes[position].flat else tensor

    def _compute(self, images: int, dense: Any) -> None:
        raise NotImplementedError


class RowPart(_Engine):
    """For large batches: vectors over the images."""

    def __init__(self, graph: Graph, nodes: list[int], lanes: int) -> None:
        super().__init__(graph, nodes)
        self.lanes = lanes
        self.lowering = RowLowering(graph, nodes, self.inputs, self.outputs, lanes, torch.float32)
        lowered = self.lowering.operations
        self.operations = (InstructionStruct * len(lowered))()
        for struct, op in zip(self.operations, lowered, strict=True):
            struct.kind, struct.dense, struct.parts = op.kind, op.dense, op.parts
            struct.spec = ctypes.addressof(op.spec.struct)
            # A gather's rows are places in the whole memory.
            struct.src = op.source.offset if op.source is not None else 0
            struct.dst = op.output.offset if op.output is not None else 0
        steps = self.lowering.steps()
        self.steps = (StepStruct * len(steps))(*(StepStruct(*step) for step in steps))

    def _compute(self, images: int, dense: Any) -> None:
        threads = torch.get_num_threads()
        tiles = -(-images // self.lanes)
        memory_tiles = threads if tiles >= threads else 1
        memory_tile = self.lowering.memory_rows * self.lanes
        if len(self.memory) < memory_tiles * memory_tile:
            self.memory = torch.empty(memory_tiles * memory_tile, dtype=torch.float32)
        kernels(torch.float32).tkn_run(
            self.operations,
            len(self.operations),
            self.steps,
            len(self.steps),
            dense,
            c_void_p(self.memory.data_ptr()),
            c_int64(memory_tile),
            memory_tiles,
            images,
            self.lanes,
            threads,
        )


class MapPart(_Engine):
    """For small batches: vectors over the channels."""

    def __init__(self, graph: Graph, nodes: list[int]) -> None:
        super().__init__(graph, nodes)
        width = kernels(torch.float32).tkn_width()
        self.lowering = MapLowering(graph, nodes, self.inputs, self.outputs, width)
        self.memory = self.lowering.memory()[None]
        lowered = self.lowering.operations
        self.operations = (InstructionStruct * len(lowered))()
        for struct, op in zip(self.operations, lowered, strict=True):
            struct.kind, struct.dense, struct.parts = op.kind, op.dense, op.parts
            struct.spec = ctypes.addressof(op.spec.struct)
            struct.src, struct.dst = op.source, op.output

    def _compute(self, images: int, dense: Any) -> None:
        if len(self.memory) < images:
            self.memory = self.memory[:1].repeat(images, 1)
        kernels(torch.float32).tkn_run_maps(
            self.operations,
            len(self.operations),
            dense,
            c_void_p(self.memory.data_ptr()),
            c_int64(self.memory.shape[1]),
            images,
            torch.get_num_threads(),
        )


def split(graph: Graph) -> Iterator[list[int]]:
    """Runs of nodes that the engine knows, and single nodes that torch runs."""
    run: list[int] = []
    for position, node in enumerate(graph.nodes):
        if isinstance(node.operation, Input):
            continue
        if isinstance(node.operation, Torch):
            if run:
                yield run
            yield [position]
            run = []
        else:
            run.append(position)
    if run:
        yield run


def run_parts(graph: Graph, parts: list[Part], x: Tensor) -> Tensor:
    """The graph's output for images x [B, C, H, W]."""
    values: dict[int, Any] = {0: x}
    for part in parts:
        part.run(graph, values)
    return values[graph.output]
