"""A trained network as a plan: one pass of the ROI engine from input to output."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from tkn.engine.graph import Convolve, Graph, Input, Size, Slot, Torch, build_graph
from tkn.engine.kernels import kernels
from tkn.engine.lower_maps import MapLowering
from tkn.engine.lower_rows import RowLowering
from tkn.engine.rows import tile_lanes
from tkn.engine.structs import OperationStruct, StepStruct
from tkn.files import whole_file

_FORMAT = 1
#: Up to this batch size vectors go over the channels, not over the images.
_SMALL = 8
#: A plan must agree with the network it was made of to this part of its largest output.
_TOLERANCE = 1e-4


def accelerate(model: nn.Module, batch_size: int, input_size: Size | None = None) -> Plan:
    """A trained network as a plan that computes inside the ROIs only: plan(x) is model.eval()(x), faster, on the CPU.

    Batch normalisation is folded into the convolutions; windows, biases, ReLU and pooling are done as a convolution
    writes; inputs that are known to be constant outside of their own ROIs are not multiplied. The model is copied.

    Args:
        model: takes one tensor [B, C, H, W] of float32 and returns one tensor.
        batch_size: what the plan is made for; it takes other batches, but may be slower than a plan of their own.
        input_size: (C, H, W) of the images; by default read off the model's first use.

    Layers that the engine does not know are run by torch: `plan.fallbacks` names them. ValueError for a model whose
    steps can't be followed, or that is not in float32 on the CPU. Where there is no compiler, torch runs everything.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise ValueError(f"accelerate takes models of float32 on the CPU; {name} is {parameter.dtype} on {parameter.device}")
    if input_size is None:
        raise ValueError("input_size=(C, H, W) is needed")
    graph = build_graph(model, input_size)
    return Plan(graph, batch_size)


@dataclass
class _Torch:
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
        self.memory = torch.empty(0)

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
            dense.append(torch.empty(images, *size))
        self._compute(images, (c_void_p * len(dense))(*(tensor.data_ptr() for tensor in dense)))
        for position, tensor in zip(self.outputs, dense[len(self.inputs) :], strict=True):
            values[position] = tensor.view(images, -1) if graph.nodes[position].flat else tensor

    def _compute(self, images: int, dense: Any) -> None:
        raise NotImplementedError


class _Rows(_Engine):
    """For large batches: vectors over the images."""

    def __init__(self, graph: Graph, nodes: list[int], lanes: int) -> None:
        super().__init__(graph, nodes)
        self.lanes = lanes
        self.lowering = RowLowering(graph, nodes, self.inputs, self.outputs, lanes, torch.float32)
        lowered = self.lowering.operations
        self.operations = (OperationStruct * len(lowered))()
        for struct, op in zip(self.operations, lowered, strict=True):
            struct.kind, struct.dense, struct.parts = op.kind, op.dense, op.parts
            struct.spec = ctypes.addressof(op.spec.struct)
            # A gather's rows are places in the whole memory.
            struct.src = op.source.offset if op.source is not None else 0
            struct.dst = op.output.offset if op.output is not None else 0
        steps = self.lowering.steps()
        self.steps = (StepStruct * len(steps))(*steps)

    def _compute(self, images: int, dense: Any) -> None:
        threads = torch.get_num_threads()
        tiles = -(-images // self.lanes)
        memory_tiles = threads if tiles >= threads else 1
        memory_tile = self.lowering.memory_rows * self.lanes
        if len(self.memory) < memory_tiles * memory_tile:
            self.memory = torch.empty(memory_tiles * memory_tile)
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


class _Maps(_Engine):
    """For small batches: vectors over the channels."""

    def __init__(self, graph: Graph, nodes: list[int]) -> None:
        super().__init__(graph, nodes)
        width = kernels(torch.float32).tkn_width()
        self.lowering = MapLowering(graph, nodes, self.inputs, self.outputs, width)
        self.memory = self.lowering.memory()[None]
        lowered = self.lowering.operations
        self.operations = (OperationStruct * len(lowered))()
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


class Plan:
    """What `accelerate` makes; call it like the network."""

    def __init__(self, graph: Graph, batch_size: int) -> None:
        self.graph = graph
        self.batch_size = batch_size
        self._lock = threading.Lock()
        self._parts = [self._part(nodes) for nodes in _split(graph)]

    def _part(self, nodes: list[int]) -> _Torch | _Engine:
        if isinstance(self.graph.nodes[nodes[0]].operation, Torch):
            return _Torch(nodes[0])
        operations = [self.graph.nodes[n].operation for n in nodes]
        grouped = any(isinstance(op, Convolve) and op.groups > 1 for op in operations)
        width = kernels(torch.float32).tkn_width()
        if self.batch_size <= _SMALL and not grouped:
            return _Maps(self.graph, nodes)
        return _Rows(self.graph, nodes, tile_lanes(self.batch_size, torch.get_num_threads(), width))

    @property
    def input_size(self) -> Size:
        """(C, H, W)"""
        size = self.graph.nodes[0].size
        assert size is not None
        return size

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """The layers that torch runs: "name (type)"."""
        return self.graph.fallbacks

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> what the network returns. ValueError for another size, type or device."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.input_size:
            raise ValueError(f"the plan is for images of {self.input_size} (C, H, W), not for {tuple(x.shape)}")
        if x.device.type != "cpu" or x.dtype != torch.float32:
            raise ValueError(f"the plan takes float32 on the CPU, not {x.dtype} on {x.device}")
        with self._lock:
            values: dict[int, Any] = {0: x}
            for part in self._parts:
                part.run(self.graph, values)
            return values[self.graph.output]


def _split(graph: Graph) -> Iterator[list[int]]:
    """Runs of nodes without torch, and single nodes with."""
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
