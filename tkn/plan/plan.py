"""A trained network as a plan: one pass of the ROI engine from input to output."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tkn.app.files import whole_file
from tkn.app.messages import first_line
from tkn.backends.cpu.build import available, kernels
from tkn.backends.cpu.rows import tile_lanes
from tkn.ops.choose import measure
from tkn.plan.capture import build_graph, frozen
from tkn.plan.graph import Convolve, Graph, Size, Torch
from tkn.plan.parts import MapPart, Part, RowPart, TorchPart, by_torch, run_parts, split

_FORMAT = 1
#: Up to this batch size vectors may go over the channels instead of the images: whichever is faster.
_SMALL = 16
#: A plan must agree with the network it was made of to this part of its largest output.
_TOLERANCE = 1e-3


def accelerate(model: nn.Module, batch_size: int, input_size: tuple[int, ...] | None = None) -> Plan:
    """A trained network as a plan that computes inside the ROIs only: plan(x) is model.eval()(x), faster, on the CPU.

    Batch normalisation is folded into the convolutions; windows, biases, ReLU and pooling are done as a convolution
    writes; inputs that are known to be constant outside of their own ROIs are not multiplied. The model is copied.

    Args:
        model: takes one tensor [B, C, H, W] of float32 and returns one tensor.
        batch_size: what the plan is made for; it takes other batches, at another speed.
        input_size: (C, H, W) of the images; None: that of the first batch, when the plan is then made.

    Layers that the engine does not know are run by torch: `plan.fallbacks` names them. ValueError for a model whose
    operations can't be followed, or that is not of float32 on the CPU. Where the kernels can't be compiled, torch runs
    everything, after a warning.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number, at least 1")
    if input_size is not None and (len(input_size) != 3 or min(input_size) < 1):
        raise ValueError(f"input_size={tuple(input_size)} must be (channels, height, width)")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ValueError(
                f"accelerate takes models of float32 on the CPU; {name} is {tensor.dtype} on {tensor.device}"
            )
    if input_size is None:
        return Plan(copy.deepcopy(model), batch_size)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return Plan(_checked_graph(model, tuple(input_size)), batch_size)


def load_plan(path: str | Path) -> Plan:
    """A plan written by `Plan.save`, made anew for this machine.

    The file may hold any Python object: load only files you trust. FileNotFoundError; ValueError for other files.
    """
    try:
        saved = torch.load(path, weights_only=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"{path} is damaged or not a plan: {first_line(error)}") from error
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT or not isinstance(saved.get("graph"), Graph):
        raise ValueError(f"{path} is not a plan of format {_FORMAT}")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return Plan(saved["graph"], saved["batch_size"])


def _checked_graph(model: nn.Module, input_size: tuple[int, ...]) -> Graph:
    """The model's graph, held against the model: in-place operations, for one, could mean something else."""
    model = frozen(model)
    graph = build_graph(model, input_size)
    x = _random_images(input_size)
    difference = _difference(run_parts(graph, [by_torch(graph, nodes) for nodes in split(graph)], x), model(x))
    if difference > _TOLERANCE:
        raise ValueError(f"{type(model).__name__} can't be followed: its plan would differ by {difference:.1e}")
    return graph


def _random_images(input_size: tuple[int, ...]) -> Tensor:
    return torch.rand(2, *input_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest output; 0 where that is no finite number."""
    largest = theirs.abs().max()
    return float((ours - theirs).abs().max() / largest) if torch.isfinite(largest) and largest > 0 else 0.0


class Plan:
    """What `accelerate` makes; call it like the network.

    `small`: with vectors over the channels (True) or the images (False); by default whichever is faster.
    """

    def __init__(self, source: Graph | nn.Module, batch_size: int, *, small: bool | None = None) -> None:
        self.batch_size = batch_size
        self._small = small
        self._lock = threading.Lock()
        self._model: nn.Module | None = None
        if isinstance(source, Graph):
            self._make(source)
        else:
            self._model = source

    def _make(self, graph: Graph) -> None:
        self._graph = graph
        self._parts = [by_torch(graph, nodes) for nodes in split(graph)]
        if not available(torch.float32):
            return
        x = _random_images(self.input_size)
        expected = run_parts(graph, self._parts, x)
        candidates = list(self._candidates())
        differences = [_difference(run_parts(graph, parts, x), expected) for parts in candidates]
        right = [parts for parts, difference in zip(candidates, differences, strict=True) if difference <= _TOLERANCE]
        if not right:
            warnings.warn(f"torch runs the plan: the engine's result differs by {max(differences):.1e}", stacklevel=4)
            return
        self._parts = right[0]
        if len(right) > 1:
            x = torch.zeros(self.batch_size, *self.input_size, dtype=torch.float32)
            self._parts = min(right, key=lambda parts: measure(lambda: run_parts(graph, parts, x)))

    def _candidates(self) -> Iterator[list[Part]]:
        """The ways to compute the plan that may be the fastest for its batch size."""
        nodes = self._graph.nodes
        grouped = any(isinstance(node.operation, Convolve) and node.operation.groups > 1 for node in nodes)
        if self._small is not False and self.batch_size <= _SMALL and not grouped:
            yield self._engine_parts(None)
            if self._small:
                return
        width = kernels(torch.float32).tkn_width()
        widest = tile_lanes(self.batch_size, torch.get_num_threads(), width)
        for lanes in {widest, max(width, widest // 2)}:
            yield self._engine_parts(lanes)

    def _engine_parts(self, lanes: int | None) -> list[Part]:
        """In tiles of `lanes` images, or with vectors over the channels."""
        parts: list[Part] = []
        for nodes in split(self._graph):
            if isinstance(self._graph.nodes[nodes[0]].operation, Torch):
                parts.append(TorchPart(nodes[0]))
            else:
                parts.append(MapPart(self._graph, nodes) if lanes is None else RowPart(self._graph, nodes, lanes))
        return parts

    def _made(self) -> Graph:
        if self._model is not None:
            raise ValueError("the plan is made at its first use: give accelerate an input_size to have it before")
        return self._graph

    @property
    def input_size(self) -> Size:
        """(C, H, W)"""
        size = self._made().nodes[0].size
        assert size is not None
        return size

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """The layers that torch runs: "name (type)"."""
        return self._made().fallbacks

    def save(self, path: str | Path) -> None:
        """Write the plan's operations and weights to a file for `load_plan`, whole or not at all."""
        with whole_file(Path(path)) as temporary:
            torch.save({"format": _FORMAT, "graph": self._made(), "batch_size": self.batch_size}, temporary)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> what the network returns. ValueError for images of another size, type or device."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            raise ValueError(f"the plan takes float32 on the CPU, not {x.dtype} on {x.device}")
        with self._lock, torch.autocast("cpu", enabled=False):
            if self._model is not None and x.dim() == 4:
                graph = _checked_graph(self._model, tuple(x.shape[1:]))
                self._model = None
                self._make(graph)
            if x.dim() != 4 or len(x) == 0 or tuple(x.shape[1:]) != self.input_size:
                expected = ", ".join(map(str, self.input_size)) if self._model is None else "C, H, W"
                raise ValueError(f"the plan takes images [B, {expected}], not {list(x.shape)}")
            return run_parts(self._graph, self._parts, x)
