"""Target layers one after the other inside their ROIs on a GPU: a batch becomes rows, and dense after the last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tkn.app.messages import first_line
from tkn.backends.cuda.device import on, tf32_allowed
from tkn.backends.cuda.packing import from_rows, padded, to_rows
from tkn.backends.cuda.rows import TILE
from tkn.backends.cuda.stage import Computed, Stage
from tkn.spec import Target
from tkn.windows import kept_window, window_gradients

#: What a stage leaves for its backward pass.
_LEFT = 4


@dataclass(frozen=True, eq=False)
class Chain:
    """The layers `targets` by their `stages`: [B, C, H, W] -> [B, O, H', W'] of `dtype`, in channels-last or not."""

    targets: tuple[Target, ...]
    stages: tuple[Stage, ...]
    batch: int
    dtype: torch.dtype
    channels_last: bool

    #: Images are not computed in tiles of a number that would have to be known.
    lanes = 1

    def room_shapes(self) -> list[tuple[int, ...]]:
        """Of what `forward` leaves for `backward`."""
        images = padded(self.batch)
        shapes: list[tuple[int, ...]] = []
        for stage in self.stages:
            output, convolved = (rows.capacity + 1 for rows in (stage.output, stage.convolved))
            kept = (1, 1) if stage.averages else (output, images)
            shapes += [(output, images), (convolved, images), kept, (convolved,)]
        return shapes

    @torch.no_grad()
    def forward(self, x: Tensor, room: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The result, and what `backward` needs again, if `room` is given copied there."""
        saved: list[Tensor] = []
        with self._computing(x.device):
            rows = to_rows(x.detach(), self.stages[0].source, self.dtype)
            for target, stage in zip(self.targets, self.stages, strict=True):
                computed = stage.forward(
                    rows, target.weight, target.bias, self._window(target, stage), tf32=tf32_allowed()
                )
                saved += [computed.output, computed.convolved, computed.kept, computed.window]
                rows = computed.output
            if room is not None:
                for there, made in zip(room, saved, strict=True):
                    there.copy_(made)
            return self._dense(rows), saved

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """The result without what gradients need."""
        with self._computing(x.device):
            rows = to_rows(x.detach(), self.stages[0].source, self.dtype)
            for target, stage in zip(self.targets, self.stages, strict=True):
                rows = stage.infer(rows, target.weight, target.bias, self._window(target, stage), tf32=tf32_allowed())
            return self._dense(rows)

    @contextmanager
    def _computing(self, device: torch.device) -> Iterator[None]:
        """On the device, without autocast; says what would need less memory where there is not enough."""
        try:
            with on(device), torch.autocast(device.type, enabled=False):
                yield
        except torch.OutOfMemoryError as error:
            packed = max(stage.lists.blocks * stage.lists.depth * TILE * self.dtype.itemsize for stage in self.stages)
            raise torch.OutOfMemoryError(
                f"{first_line(error)} A layer's weights, packed for the ROI engine, take {packed / 2**30:.2g} GiB, and "
                f"in training three times more; a smaller batch (now {self.batch}), smaller ROIs or engine='dense' "
                "need less"
            ) from error

    def _window(self, target: Target, stage: Stage) -> Tensor:
        return stage.window_of_rows(kept_window(target, stage.geometry.output_size, torch.float32))

    def _dense(self, rows: Tensor) -> Tensor:
        return from_rows(rows, self.stages[-1].output, self.batch, self.dtype, channels_last=self.channels_last)

    @torch.no_grad()
    def backward(self, grad: Tensor, x: Tensor, saved: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of x and of each layer's weight, bias, loc and scale that `needs` asks for, in their types."""
        results: list[Tensor | None] = [None] * len(needs)
        with self._computing(x.device):
            computed = [self._computed(saved[_LEFT * i : _LEFT * (i + 1)]) for i in range(len(self.stages))]
            inputs = [to_rows(x, self.stages[0].source, self.dtype), *(one.output for one, _ in pairwise(computed))]
            rows = to_rows(grad, self.stages[-1].output, self.dtype)
            for i in reversed(range(len(self.stages))):
                target, stage = self.targets[i], self.stages[i]
                mine = needs[1 + 4 * i : 5 + 4 * i]
                wanted = (any(needs[: 1 + 4 * i]), mine[0], mine[1], mine[2] or mine[3])
                grads = stage.backward(rows, inputs[i], target.weight, computed[i], wanted, tf32=tf32_allowed())
                results[1 + 4 * i : 3 + 4 * i] = grads.of_parameters(target.weight)
                if grads.window is not None:
                    size = stage.geometry.output_size
                    inside = grads.window * stage.inside(target) if target.spec.clip else grads.window
                    results[3 + 4 * i : 5 + 4 * i] = window_gradients(target, size, inside)
                if grads.x is None:
                    break
                rows = grads.x
            else:
                last = x.stride(1) == 1 and x.shape[1] > 1
                results[0] = from_rows(rows, self.stages[0].source, self.batch, x.dtype, channels_last=last)
        return [result if needed else None for result, needed in zip(results, needs, strict=True)]

    def _computed(self, left: Sequence[Tensor]) -> Computed:
        """As `forward` made it, also of what a room of another type keeps."""
        output, convolved, kept, window = left
        return Computed(output.to(self.dtype), convolved.to(self.dtype), kept.to(torch.uint8), window.float())
