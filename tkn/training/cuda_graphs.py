"""CUDA graphs: the kernels of a step start together, which one by one would take the host longer than the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tkn.app.messages import first_line
from tkn.moving import NotPrepared
from tkn.ops.following import Following

Result = TypeVar("Result")

#: In the first steps libraries choose their kernels, which no graph can capture.
_FIRST_STEPS = 3
#: So many steps in a row that could not be captured are enough.
_MOST_FAILURES = 10


def supports_cuda_graphs(device: torch.device) -> bool:
    """Whether the device has CUDA graphs."""
    return device.type == "cuda"


def may_capture(trainer: Mapping[str, Any]) -> bool:
    """Whether a run with this configuration `trainer` may have its steps captured.

    A compiled network brings kernels of its own; several processes add their gradients up, and accumulated ones add to
    those of the step before; `16-mixed` scales the loss anew in every step; looking for an anomaly waits for the GPU.
    """
    alone = trainer["devices"] == 1 and trainer["strategy"] == "auto"
    plain = trainer["accumulate_grad_batches"] == 1 and trainer["precision"] != "16-mixed"
    return bool(trainer["cuda_graphs"] and alone and plain and not trainer["compile"] and not trainer["detect_anomaly"])


class Captured(Generic[Result]):
    """The kernels that `function` starts, captured once, without running them; `replay` runs them.

    `function` reads and writes tensors that stay where they are, and must not wait for the GPU.
    """

    def __init__(self, function: Callable[[], Result]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # What autocast has made of the weights so far would be theirs in every replay.
        torch.clear_autocast_cache()
        with torch.cuda.graph(self.graph):
            self.results = function()
        torch.clear_autocast_cache()

    def replay(self) -> Result:
        """The function's results, in the same tensors every time."""
        self.graph.replay()
        return self.results


class GradientGraph:
    """The losses of a batch and the gradients of the one called "total", for batches of one size.

    Args:
        losses: (input, targets) -> the losses by name, scalars.
        parameters: those that get the gradients.
        batch: one of the size.
    """

    def __init__(
        self,
        losses: Callable[[Tensor, Tensor], dict[str, Tensor]],
        parameters: Iterable[nn.Parameter],
        batch: tuple[Tensor, Tensor],
    ) -> None:
        self.parameters = list(parameters)
        self.batch = [tensor.clone() for tensor in batch]

        def step() -> tuple[dict[str, Tensor], list[Tensor | None]]:
            self._set_gradients([None] * len(self.parameters))
            values = losses(*self.batch)
            # As outside of the autocast that a training step is in.
            with torch.autocast(values["total"].device.type, enabled=False):
                values["total"].backward()
            return {name: value.detach() for name, value in values.items()}, [p.grad for p in self.parameters]

        self.captured = Captured(step)

    def __call__(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The losses of `batch`; sets the parameters' gradients."""
        for mine, given in zip(self.batch, batch, strict=True):
            mine.copy_(given)
        values, gradients = self.captured.replay()
        self._set_gradients(gradients)
        return values

    def _set_gradients(self, gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


class Losses(Protocol):
    """A batch's losses by name; "total", which is minimised, is with the scale penalty if `penalised`."""

    def __call__(self, x: Tensor, targets: Tensor, penalised: bool) -> dict[str, Tensor]: ...


class StepGraphs:
    """A run's training steps on batches of one size, all but the first few captured.

    Args:
        losses: of a batch.
        projection: what follows the optimiser's step; it may look at the gradients.
        parameters: those that the optimiser changes.
    """

    def __init__(self, losses: Losses, projection: Callable[[], None], parameters: Iterable[nn.Parameter]) -> None:
        self.losses = losses
        self.projection = projection
        self.parameters = list(parameters)
        self.steps = 0
        self.penalised = False
        self.gradients: GradientGraph | None = None
        self.projected: Captured[None] | None = None
        self.held = False
        self.following = Following()
        #: how often in a row a step was not captured, and whether that is no longer tried
        self.failures, self.fails = 0, False

    def step(self, batch: tuple[Tensor, Tensor], penalised: bool) -> dict[str, Tensor] | None:
        """The losses of `batch`, whose gradients the parameters have then. None if it has to be computed outside of the
        graphs: in the first steps, and where the ROIs have outgrown what was captured."""
        self.steps += 1
        if self.steps <= _FIRST_STEPS or self.fails:
            return None
        if self.gradients is not None and self.following.left() and not self.following.remake():
            self.gradients = None
            return None
        if self.gradients is None or self.penalised != penalised:
            self.gradients, self.penalised = None, penalised  # most of the old graph's memory is free first
            self.gradients = self._captured(batch)
        return None if self.gradients is None else self.gradients(batch)

    def _captured(self, batch: tuple[Tensor, Tensor]) -> GradientGraph | None:
        """A new graph; None if what it needs of the ROIs has to be made outside of it first."""
        self.projected = None  # it looks at the gradients, and the bounds, of the old one
        made, why = None, "the ROIs leave their bounds in every step"
        try:
            with self.following.recording():
                made = GradientGraph(partial(self.losses, penalised=self.penalised), self.parameters, batch)
        except NotPrepared:
            why = "what the ROI engine needs is made anew in every step"
        except RuntimeError as error:
            if not self.following.record.bounds:
                raise
            # What the ROI engine does in a step can't be captured here: the run goes on without graphs.
            why, self.failures = first_line(error), _MOST_FAILURES
        else:
            self.following.check()
            made = None if self.following.left() else made
        self.failures = 0 if made is not None else self.failures + 1
        if self.failures >= _MOST_FAILURES:
            self.fails = True
            warnings.warn(f"steps are no longer captured: {why}", RuntimeWarning, stacklevel=2)
        return made

    def project(self, *, captured: bool, held: bool = False) -> None:
        """The projection after a step, and a look at the ROIs. `captured`: by a graph, made when it is first called,
        and when `held` changes: whether a budget holds the ROIs where they are."""
        if self.held != held:
            self.projected, self.held = None, held
        if captured and self.projected is None:
            self.projected = Captured(self._project)
        if captured and self.projected is not None:
            self.projected.replay()
        else:
            self._project()

    def _project(self) -> None:
        self.projection()
        self.following.check()
