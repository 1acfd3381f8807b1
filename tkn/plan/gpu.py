"""Plans on a GPU: a graph's parts by the GPU's kernels, each run as one CUDA graph, the others by torch."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tkn.plan.compare import difference, random_images
from tkn.plan.graph import Affine, Call, Constant, Convolve, Graph, Node, Operation
from tkn.plan.lower_gpu import GpuLowering, Memory
from tkn.plan.parts import Part, Program, TorchPart, Values, split, torch_shape

#: How far results may be from those in float32 on the CPU, as a part of the largest.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
_TRIED_IMAGES = 5


class GpuPart(Part):
    """Nodes that the kernels know, on batches of `images`; smaller ones are filled up, larger ones cut."""

    def __init__(self, graph: Graph, nodes: list[int], images: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(graph, nodes)
        self.images, self.device, self.dtype = images, device, dtype
        self.lowering = GpuLowering(graph, nodes, self.inputs, self.outputs, images, device, dtype)
        self._free: list[_Run] = []
        self._lock = threading.Lock()

    def run(self, values: Values) -> None:
        inputs = [values[position] for position in self.inputs]
        count = len(inputs[0])
        outputs = [
            torch.empty(count, *torch_shape(self.graph, position), dtype=self.dtype, device=self.device)
            for position in self.outputs
        ]
        with self._lock:
            run = self._free.pop() if self._free else None
        run = run or _Run(self)
        for start in range(0, count, self.images):
            some = slice(start, start + self.images)
            run([x[some] for x in inputs], [y[some] for y in outputs])
        with self._lock:
            self._free.append(run)
        values.update(zip(self.outputs, outputs, strict=True))

    def empty(self, position: int) -> Tensor:
        """A batch of a node's activations as the kernels take and give it."""
        size = self.graph.nodes[position].size
        assert size is not None
        return torch.zeros(self.images, *size, dtype=self.dtype, device=self.device)


class _Run:
    """Memory for one call at a time, and the kernels that compute in it as one graph."""

    def __init__(self, part: GpuPart) -> None:
        self.steps = part.lowering.steps
        inputs, outputs = ([part.empty(position) for position in ends] for ends in (part.inputs, part.outputs))
        self.memory = Memory(part.lowering.memory(), inputs, outputs)
        self.graph: torch.cuda.CUDAGraph | None = None
        if part.device.type == "cuda":
            self._compute()  # kernels are compiled when they are first started
            torch.cuda.synchronize(part.device)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._compute()

    def _compute(self) -> None:
        for step in self.steps:
            step(self.memory)

    def __call__(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Compute dense inputs [at most as many images, ...] to `outputs`."""
        count = len(outputs[0])
        for mine, given in zip(self.memory.inputs, inputs, strict=True):
            mine[:count].copy_(given.reshape(count, *mine.shape[1:]))
        if self.graph is None:
            self._compute()
        else:
            self.graph.replay()
        for mine, wanted in zip(self.memory.outputs, outputs, strict=True):
            wanted.copy_(mine[:count].reshape(wanted.shape))


def arranged_on_gpu(graph: Graph, images: int, device: torch.device, dtype: torch.dtype) -> Program:
    """The graph by the GPU's kernels; by torch on the device, after a warning, if these do not compute the same."""
    far = moved(graph, device, dtype)
    by_torch = Program.by_torch(far)
    program = Program(far, list(_parts(graph, far, images, device, dtype)))
    x = random_images(_TRIED_IMAGES, graph.input_size)
    expected = Program.by_torch(graph)(x)
    differs = difference(program(x.to(device, dtype)).float().cpu(), expected)
    if differs <= TOLERANCE[dtype]:
        return program
    warnings.warn(f"torch runs the plan: the GPU engine's result differs by {differs:.1e}", stacklevel=2)
    return by_torch


def _parts(graph: Graph, far: Graph, images: int, device: torch.device, dtype: torch.dtype) -> Iterator[Part]:
    for nodes in split(graph):
        if graph.nodes[nodes[0]].by_torch:
            yield TorchPart(far, nodes)
        else:
            yield GpuPart(graph, nodes, images, device, dtype)


def moved(graph: Graph, device: torch.device, dtype: torch.dtype) -> Graph:
    """The same operations on a device, with weights of `dtype`."""
    nodes = [
        Node(node.name, _moved(node.operation, device, dtype), node.inputs, node.size, node.flat)
        for node in graph.nodes
    ]
    return Graph(nodes, graph.output)


def _moved(operation: Operation, device: torch.device, dtype: torch.dtype) -> Operation:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, dict):
            return {key: move(part) for key, part in value.items()}
        return type(value)(map(move, value)) if type(value) in (list, tuple) else value

    made = copy.copy(operation)
    if isinstance(made, Convolve):
        made.weight, made.bias = move(made.weight), move(made.bias)
        # Windows and masks are kept beside what they were made of.
        for name in ("window", "mask"):
            made.__dict__[name] = move(getattr(operation, name))
    elif isinstance(made, Affine):
        made.scale, made.shift = made.scale.to(device), made.shift.to(device)
    elif isinstance(made, Constant):
        made.value = move(made.value)
    elif isinstance(made, Call):
        made.args, made.kwargs = move(made.args), move(made.kwargs)
    return made
