"""The engines by name, and the backends that compute target layers inside their ROIs, by their device."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from tkn.app.messages import unknown
from tkn.spec import Target
from tkn.work import Work

Engine = Literal["auto", "dense", "roi"]
ENGINES: tuple[str, ...] = get_args(Engine)
#: Added to an engine's name: dense convolutions of many channels may compute in the frequency domain.
FOURIER = "+fourier"

#: Imported when they are first asked for: what they import takes time.
_MODULES = {"cpu": "tkn.backends.cpu.backend", "cuda": "tkn.backends.cuda.backend"}


#: Devices whose backends "auto" compares with torch. The GPU's kernels have not run on a GPU yet: "roi" asks for them.
_CHOSEN = {"cpu"}


class Runner(Protocol):
    """Layers on batches of one shape, as an engine computes them."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """The layers."""

    def room_shapes(self) -> list[tuple[int, ...]]:
        """Of what `forward` puts into `room`."""

    def forward(self, x: Tensor, room: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The result, and what `backward` needs again: the content of `room`, perhaps more before it."""

    def backward(self, grad: Tensor, x: Tensor, saved: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of x and of each layer's weight, bias, loc and scale that are needed. `saved`: what `forward`
        gave, or the content of `room` alone."""


class RoiRunner(Runner, Protocol):
    """Layers inside their ROIs."""

    @property
    def lanes(self) -> int:
        """Images that are computed together: a runner of as many can read what this one saved."""

    def infer(self, x: Tensor) -> Tensor:
        """The result alone."""


class Backend(Protocol):
    """A module that computes target layers inside their ROIs."""

    def reason_not(self, x: Tensor, targets: Sequence[Target], *, autocast: bool) -> str | None:
        """Why it can't compute the layers on x; None if it can."""

    def available(self, device: torch.device, dtype: torch.dtype, *, may_build: bool) -> bool:
        """Whether it runs on the device; with `may_build` it may be compiled and checked first."""

    def live(self, shape: tuple[int, ...], dtype: torch.dtype, targets: Sequence[Target], result: torch.dtype) -> float:
        """The share of the numbers that the last of `targets` gives on that are not known to be zero."""

    def seconds(self, engine: str, work: Work) -> float:
        """What `engine`, "roi" or on the same device "dense", is estimated to take here."""

    def chain(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        targets: Sequence[Target],
        result: torch.dtype,
        lanes: int | None = None,
    ) -> RoiRunner:
        """The layers on inputs of `shape` and `dtype`, with a result of the type `result`."""


def may_choose(x: Tensor) -> bool:
    """Whether engine="auto" may choose an ROI backend for x."""
    return x.device.type in _CHOSEN


def backend_of(device: torch.device) -> Backend | None:
    """The ROI backend of a device, if there is one."""
    module = _MODULES.get(device.type)
    return None if module is None else import_module(module)


def check_engine(name: str) -> Engine:
    """`name`, if it is an engine; else ValueError with the nearest."""
    if name not in ENGINES:
        raise ValueError(unknown("engine", name, ENGINES))
    return name  # type: ignore[return-value]


def split_engine(name: str) -> tuple[Engine, bool]:
    """An operator's `engine`: the engine, and whether dense convolutions may compute in the frequency domain."""
    return check_engine(name.removesuffix(FOURIER)), name.endswith(FOURIER)
