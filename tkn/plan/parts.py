"""The parts of a plan: runs of nodes computed by the kernels in either layout, or by torch; and all of them."""

from __future__ import annotations

import copy
import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from tkn.backends.cpu.build import kernels
from tkn.backends.cpu.structs import InstructionStruct, Kind, StepStruct, address
from tkn.plan.compare import Error
from tkn.plan.dense import run_node
from tkn.plan.form import filled
from tkn.plan.graph import Graph, Input, Node
from tkn.plan.lower_maps import MapLowering
from tkn.plan.lower_rows import RowLowering

#: What the nodes have computed, by their positions in the graph.
Values = dict[int, Any]


class Part(ABC):
    """Nodes that run in one go: `inputs` are the nodes before whose values they read, `outputs` those needed after."""

    def __init__(self, graph: Graph, nodes: list[int]) -> None:
        own = set(nodes)
        self.graph, self.nodes = graph, nodes
        self.inputs = sorted({source for node in nodes for source in graph.nodes[node].inputs} - own)
        self.outputs = [node for node in nodes if node in graph.outputs or set(graph.nodes[node].users) - own]

    #: whether it multiplies pairs of bfloat16
    paired = False

    @abstractmethod
    def run(self, values: Values) -> None:
        """Compute the outputs' values from the inputs'."""


class TorchPart(Part):
    """Any nodes, one after the other."""

    def run(self, values: Values) -> None:
        inner = {position: values[position] for position in self.inputs}
        for position in self.nodes:
            run_node(self.graph, position, inner)
        for position in self.outputs:
            values[position] = inner[position]


class KernelPart(Part):
    """Nodes that the engine knows, by its kernels.

    What it reads is checked in every call: where that is not what the kernels were given lists for (the inputs may be
    of different numbers of images), torch computes instead.
    """

    def __init__(self, graph: Graph, nodes: list[int]) -> None:
        super().__init__(graph, nodes)
        self.by_torch = TorchPart(graph, nodes)
        self._read = [graph.nodes[position].shape for position in self.inputs]
        self._written = [graph.nodes[position].shape for position in self.outputs]
        self._pointers = c_void_p * (len(self.inputs) + len(self.outputs))

    def run(self, values: Values) -> None:
        dense = self._readable([values[position] for position in self.inputs])
        if dense is None:
            self.by_torch.run(values)
            return
        images = dense[0].shape[0]
        for position, shape in zip(self.outputs, self._written, strict=True):
            values[position] = output = torch.empty((images, *shape), dtype=torch.float32, device=_CPU)
            dense.append(output)
        self._compute(images, self._pointers(*[tensor.data_ptr() for tensor in dense]))

    def _readable(self, inputs: list[Any]) -> list[Tensor] | None:
        """The inputs as the kernels read them; None if they can't, or are not of one number of images."""
        for x in inputs:
            if not is_plain(x) or x.dtype is not torch.float32:
                return None
        if images_of(inputs, self._read) == 0:
            return None
        return [x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous() for x in inputs]

    @abstractmethod
    def _compute(self, images: int, dense: Any) -> None:
        """`dense`: where the inputs and then the outputs begin."""


def images_of(inputs: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> int:
    """Of how many images they are activations, of these shapes; 0 if they are not, or of different numbers."""
    if any(x.shape[1:] != shape for x, shape in zip(inputs, shapes, strict=True)):
        return 0
    counts = {x.shape[0] for x in inputs}
    return counts.pop() if len(counts) == 1 else 0


def is_plain(x: object) -> bool:
    """Whether it is a tensor with numbers of its own in the CPU's memory."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.layout == torch.strided  # type: ignore[attr-defined]


class Scratch:
    """Memory for calls that may run at the same time: each takes a piece for itself and gives it back.

    `make`: memory of at least so many units.
    """

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        self._make = make
        self._free: list[tuple[int, Tensor]] = []

    def run(self, units: int, compute: Callable[[int], object]) -> None:
        """Call `compute` with the address of a piece of that size."""
        try:
            piece = self._free.pop()  # which no other thread can do with the same one
        except IndexError:
            piece = (0, _NOTHING)
        if piece[0] < units:
            piece = (units, self._make(units))
        try:
            compute(piece[1].data_ptr())
        finally:
            self._free.append(piece)


_CPU = torch.device("cpu")
_NOTHING = torch.empty(0, device=_CPU)


def numbers(count: int) -> Tensor:
    """Memory of any content."""
    return torch.empty(count, dtype=torch.float32, device=_CPU)


class RowPart(KernelPart):
    """For large batches: vectors over the images, in tiles of `lanes`. Parts may share `scratch`, of numbers.

    `pairs`: convolutions multiply pairs of bfloat16 where that is faster.
    """

    def __init__(self, graph: Graph, nodes: list[int], lanes: int, scratch: Scratch, *, pairs: bool = False) -> None:
        super().__init__(graph, nodes)
        self.lanes, self._scratch = lanes, scratch
        self.lowering = RowLowering(graph, nodes, self.inputs, self.outputs, lanes, torch.float32, pairs=pairs)
        lowered = self.lowering.instructions
        self.instructions = (InstructionStruct * len(lowered))()
        for struct, instruction in zip(self.instructions, lowered, strict=True):
            struct.kind, struct.dense, struct.parts = instruction.kind, instruction.dense, instruction.parts
            struct.spec = ctypes.addressof(instruction.spec.struct)
            # A gather's rows are places in the whole memory.
            struct.src = instruction.source.offset if instruction.source is not None else 0
            struct.dst = instruction.output.offset if instruction.output is not None else 0
            struct.work = None if instruction.work is None else address(instruction.work)
        self.paired = any(instruction.kind == Kind.CONV_PAIRS for instruction in lowered)
        steps = self.lowering.steps()
        self.steps = (StepStruct * len(steps))(*(StepStruct(*step) for step in steps))
        self._tile = self.lowering.memory_rows * lanes

    def _compute(self, images: int, dense: Any) -> None:
        threads = torch.get_num_threads()
        tiles = -(-images // self.lanes)
        memory_tiles = threads if tiles >= threads else 1
        run = kernels(torch.float32).tkn_run
        counted = (self.instructions, len(self.instructions), self.steps, len(self.steps))
        rest = (c_int64(self._tile), memory_tiles, images, self.lanes, threads)
        self._scratch.run(memory_tiles * self._tile, lambda memory: run(*counted, dense, c_void_p(memory), *rest))


class MapPart(KernelPart):
    """For small batches: vectors over the pixels or channels of an image. `pairs`: as RowPart's."""

    def __init__(self, graph: Graph, nodes: list[int], *, pairs: bool = False) -> None:
        super().__init__(graph, nodes)
        self._alone = False
        width = kernels(torch.float32).tkn_width()
        self.lowering = MapLowering(graph, nodes, self.inputs, self.outputs, width, pairs=pairs)
        lowered = self.lowering.instructions
        self.instructions = (InstructionStruct * len(lowered))()
        for struct, instruction in zip(self.instructions, lowered, strict=True):
            struct.kind, struct.dense, struct.parts = instruction.kind, instruction.dense, instruction.parts
            struct.spec = ctypes.addressof(instruction.spec.struct)
            struct.src, struct.dst = instruction.source, instruction.output
            struct.work = None if instruction.work is None else address(instruction.work)
        self.paired = any(instruction.kind == Kind.MAP_CONV_PAIRS for instruction in lowered)
        image = self.lowering.memory()
        self._image = len(image)
        # What lies outside of ROIs is written once.
        self._scratch = Scratch(image.repeat)

    def on_one_thread(self) -> MapPart:
        """The same, whatever torch's number of threads."""
        part = copy.copy(self)
        part._alone = True
        return part

    def _compute(self, images: int, dense: Any) -> None:
        run = kernels(torch.float32).tkn_run_maps
        counted = (self.instructions, len(self.instructions))
        threads = 1 if self._alone else torch.get_num_threads()
        rest = (c_int64(self._image), images, threads)
        self._scratch.run(min(images, threads), lambda memory: run(*counted, dense, c_void_p(memory), *rest))


def split(graph: Graph, by_torch: Callable[[Node], bool] = attrgetter("by_torch")) -> Iterator[list[int]]:
    """Runs of nodes that the engine knows, and single nodes that only torch computes: which are `by_torch`."""
    run: list[int] = []
    for position, node in enumerate(graph.nodes):
        if isinstance(node.operation, Input):
            continue
        if by_torch(node):
            if run:
                yield run
            yield [position]
            run = []
        else:
            run.append(position)
    if run:
        yield run


@dataclass(frozen=True)
class PartCosts:
    """Operations in a row, from `first` to `last` by their names, and the seconds of a batch by the engine's kernels
    and by torch."""

    first: str
    last: str
    engine: float
    torch: float


class Program:
    """A graph's parts in the order of their execution, from inputs [B, ...] to what the network returns.

    `way`: what computes it, for a reader; `timings`: seconds by the ways it was compared with, its own first; `left`:
    what torch computes because it is faster, not because the engine can't; `error`: of its results, on the images on
    which it was checked.
    """

    def __init__(self, graph: Graph, parts: Sequence[Part], way: str = "torch") -> None:
        self.graph, self.parts, self.way = graph, parts, way
        self.timings: dict[str, float] = {}
        self.left: list[PartCosts] = []
        self.error: Error | None = None
        last = {position: index for index, part in enumerate(parts) for position in (*part.outputs, *part.inputs)}
        #: of each part, values that no later one reads
        self._done: list[list[int]] = [[] for _ in parts]
        for position, index in last.items():
            if position not in graph.outputs:
                self._done[index].append(position)

    @classmethod
    def by_torch(cls, graph: Graph, way: str = "torch") -> Program:
        """Node by node."""
        nodes = range(len(graph.input_shapes), len(graph.nodes))
        return cls(graph, [TorchPart(graph, [position]) for position in nodes], way)

    def __call__(self, *inputs: Tensor) -> Any:
        """What the network returns."""
        return filled(self.graph.form.result, self.outputs(*inputs))

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        """The tensors of it, in the order of the graph's outputs."""
        values: Values = dict(enumerate(inputs))
        for part, done in zip(self.parts, self._done, strict=True):
            part.run(values)
            for position in done:
                del values[position]
        return [values[output].contiguous() for output in self.graph.outputs]  # whatever computed them
