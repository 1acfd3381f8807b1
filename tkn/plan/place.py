"""Where a plan computes, and numbers of which type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from tkn.backends.cpu.build import without_bfloat16
from tkn.backends.cuda import backend
from tkn.plan.arrange import arranged
from tkn.plan.elsewhere import left_to_torch, moved
from tkn.plan.graph import Graph
from tkn.plan.parts import Program

_TYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}


@dataclass(frozen=True)
class Place:
    """A device, and the type of the numbers that are multiplied there; on a GPU those in memory are of it too."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, device: str | torch.device, dtype: torch.dtype) -> Place:
        """ValueError if plans can't be there."""
        try:
            place = torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(f"device={device!r} is none that torch knows") from None
        known = _TYPES.get(place.type)
        if known is None:
            raise ValueError(f"device={str(place)!r} must be cpu or a CUDA GPU")
        if dtype not in known:
            types = ", ".join(str(one).removeprefix("torch.") for one in known)
            raise ValueError(f"dtype={dtype} on {place.type} must be one of {types}")
        if place.type == "cpu":
            lacking = without_bfloat16() if dtype == torch.bfloat16 else None
            if lacking is not None:
                raise ValueError(f"dtype={dtype} on cpu needs {lacking}")
            return cls(torch.device("cpu"), dtype)
        if (place.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device={str(place)!r} is not there: torch sees {torch.cuda.device_count()} CUDA GPUs")
        return cls(torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index), dtype)

    def __str__(self) -> str:
        where = "the CPU" if self.device.type == "cpu" else str(self.device)
        return f"{str(self.dtype).removeprefix('torch.')} on {where}"

    def takes(self, x: Tensor) -> bool:
        """Whether x lies here and its numbers are of this type or of float32."""
        return x.device == self.device and x.dtype in (self.dtype, torch.float32) and x.layout == torch.strided

    def numbers(self, x: Tensor) -> Tensor:
        """x in the type that numbers in memory have here."""
        return x if x.dtype == self.memory else x.to(self.memory)

    @property
    def memory(self) -> torch.dtype:
        """Of the numbers in memory, and of results."""
        return torch.float32 if self.device.type == "cpu" else self.dtype

    def arranged(self, graph: Graph, batch_size: int, small: bool | None) -> Program:
        """The fastest right way to compute a graph, which is of float32 on the CPU, here."""
        return ARRANGED[self.device.type](graph, batch_size, small, self)

    def fallbacks(self, graph: Graph) -> tuple[str, ...]:
        """What the kernels do not know: "name (kind)"."""
        unknown = left_to_torch if self.device.type == "cuda" else attrgetter("by_torch")
        return tuple(f"{node.name} ({node.kind})" for node in graph.nodes if unknown(node))

    def by_torch(self, graph: Graph) -> Program:
        """The same, node by node."""
        return Program.by_torch(graph if self.device.type == "cpu" else moved(graph, self.device, self.dtype))

    def modes(self) -> AbstractContextManager[Any]:
        """No autocast, and what torch makes is made here. Entering takes longer than some layers: only if needed."""
        if torch._C._len_torch_function_stack() or torch.is_autocast_enabled(self.device.type):
            return self.undisturbed_modes()
        return nullcontext()

    @contextmanager
    def undisturbed_modes(self) -> Iterator[None]:
        """The same at any time."""
        with torch.autocast(self.device.type, enabled=False), torch.device(self.device):
            yield


#: In float32: where graphs are made and files are checked.
CPU = Place(torch.device("cpu"), torch.float32)


def _on_gpu(graph: Graph, batch_size: int, small: bool | None, place: Place) -> Program:
    del small  # vectors go over the images
    if not backend.available(place.device, place.dtype, may_build=True):
        return place.by_torch(graph)
    from tkn.plan.gpu import arranged_on_gpu  # it needs Triton, which may not be there

    return arranged_on_gpu(graph, batch_size, place.device, place.dtype)


def _on_cpu(graph: Graph, batch_size: int, small: bool | None, place: Place) -> Program:
    return arranged(graph, batch_size, small, pairs=place.dtype == torch.bfloat16)


#: How graphs are arranged, by the type of the device.
ARRANGED: dict[str, Callable[[Graph, int, bool | None, Place], Program]] = {"cpu": _on_cpu, "cuda": _on_gpu}
