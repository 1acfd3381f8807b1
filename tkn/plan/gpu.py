"""Plans on a GPU: a graph's parts by the GPU's kernels, each run as one CUDA graph, the others by torch."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tkn.app.messages import first_line
from tkn.backends.cuda.device import on
from tkn.plan.compare import TOLERANCES, largest_difference, random_inputs
from tkn.plan.elsewhere import left_to_torch, moved
from tkn.plan.graph import Graph
from tkn.plan.lower_gpu import GpuLowering, Memory
from tkn.plan.parts import Part, Program, TorchPart, Values, images_of, split

_TRIED_IMAGES = 5


class GpuPart(Part):
    """Nodes that the kernels know, on batches of `images`; smaller ones are filled up, larger ones cut.

    Where what it reads is not what it was made for, torch computes instead.
    """

    def __init__(
        self, graph: Graph, far: Graph, nodes: list[int], images: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(graph, nodes)
        self.images, self.device, self.dtype = images, device, dtype
        self.by_torch = TorchPart(far, nodes)
        self.shapes = {position: graph.nodes[position].shape for position in (*self.inputs, *self.outputs)}
        with on(device):
            self.lowering = GpuLowering(graph, nodes, self.inputs, self.outputs, images, device, dtype)
        self._free: list[_Run] = []
        self._captured: list[_Run] = []
        self._lock = threading.Lock()

    def run(self, values: Values) -> None:
        inputs = [values[position] for position in self.inputs]
        if not self._are_readable(inputs):
            self.by_torch.run(values)
            return
        count = len(inputs[0])
        outputs = [
            torch.empty(count, *self.shapes[position], dtype=self.dtype, device=self.device)
            for position in self.outputs
        ]
        with on(self.device), self._run() as run:
            for start in range(0, count, self.images):
                some = slice(start, start + self.images)
                run([x[some] for x in inputs], [y[some] for y in outputs])
        values.update(zip(self.outputs, outputs, strict=True))

    def _are_readable(self, inputs: list[Any]) -> bool:
        if not all(isinstance(x, Tensor) and x.device == self.device for x in inputs):
            return False
        return images_of(inputs, [self.shapes[position] for position in self.inputs]) > 0

    @contextmanager
    def _run(self) -> Iterator[_Run]:
        """One that nobody else uses meanwhile, on this or another stream."""
        with self._lock:
            run = self._free.pop() if self._free else None
        run = run or _Run(self)
        if _is_capturing(self.device):  # the graph that somebody captures computes in it from now on
            self._captured.append(run)
            yield run
            return
        run.wait()
        yield run
        run.note_end()
        with self._lock:
            self._free.append(run)

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
        self._end: torch.cuda.Event | None = None
        if part.device.type == "cuda" and not _is_capturing(part.device):
            self._compute()  # kernels are compiled when they are first started
            torch.cuda.synchronize(part.device)
            self.graph, self._end = torch.cuda.CUDAGraph(), torch.cuda.Event()
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
        if self.graph is None or _is_capturing(self.memory.rows.device):
            self._compute()
        else:
            self.graph.replay()
        for mine, wanted in zip(self.memory.outputs, outputs, strict=True):
            wanted.copy_(mine[:count].reshape(wanted.shape))

    def note_end(self) -> None:
        """Of what the current stream computes in the memory."""
        if self._end is not None:
            self._end.record()

    def wait(self) -> None:
        """Let what comes in the current stream wait for the last end."""
        if self._end is not None:
            self._end.wait()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def arranged_on_gpu(graph: Graph, images: int, device: torch.device, dtype: torch.dtype) -> Program:
    """The graph by the GPU's kernels; by torch on the device, after a warning, if these do not compute the same.

    torch.OutOfMemoryError if there is no room for a batch of so many images.
    """
    far = moved(graph, device, dtype)
    by_torch = Program.by_torch(far)
    inputs = random_inputs(_TRIED_IMAGES, graph.input_shapes)
    try:
        program = Program(far, list(_parts(graph, far, images, device, dtype)))
        results = [result.float().cpu() for result in program.outputs(*(x.to(device, dtype) for x in inputs))]
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{first_line(error)} A plan for batches of {images} images keeps all their activations inside the ROIs: a "
            "smaller batch_size, a type of half the bytes or smaller ROIs need less"
        ) from error
    except Exception as error:  # Triton's are of many kinds
        warnings.warn(f"torch runs the plan: {type(error).__name__}: {first_line(error)}", stacklevel=2)
        return by_torch
    differs = largest_difference(results, Program.by_torch(graph).outputs(*inputs))
    if differs <= TOLERANCES[dtype]:
        return program
    warnings.warn(f"torch runs the plan: the GPU engine's result differs by {differs:.1e}", stacklevel=2)
    return by_torch


def _parts(graph: Graph, far: Graph, images: int, device: torch.device, dtype: torch.dtype) -> Iterator[Part]:
    for nodes in split(graph, left_to_torch):
        if left_to_torch(graph.nodes[nodes[0]]):
            yield TorchPart(far, nodes)
        else:
            yield GpuPart(graph, far, nodes, images, device, dtype)
