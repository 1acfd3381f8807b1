"""Target layers one after the other inside their ROIs: a batch is packed into rows, and unpacked after the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tkn.backends.cpu.kernels import pack, unpack
from tkn.backends.cpu.stage import Computed, Stage
from tkn.spec import Target
from tkn.windows import kept_window, window_gradients


@dataclass(frozen=True, eq=False)
class Chain:
    """The layers `targets` by their `stages`: [B, C, *size] -> [B, O, *size'] of `dtype`, in channels-last or not."""

    targets: tuple[Target, ...]
    stages: tuple[Stage, ...]
    dtype: torch.dtype
    channels_last: bool

    @property
    def lanes(self) -> int:
        """Images of a tile: a chain of as many can read what this one saved."""
        return self.stages[0].tiles.lanes

    def room_shapes(self) -> list[tuple[int, ...]]:
        """Of what `forward` leaves for `backward` beside the packed input, in the type of the rows."""
        return [shape for stage in self.stages for shape in stage.room_shapes()]

    @torch.no_grad()
    def forward(self, x: Tensor, room: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The result and what `backward` needs again: the packed input, and what is put into `room`."""
        rows = self._packed(x)
        saved = [rows]
        with torch.autocast("cpu", enabled=False):
            for position, (target, stage) in enumerate(zip(self.targets, self.stages, strict=True)):
                window = kept_window(target, stage.geometry.output_size, stage.dtype, masked=False)
                own = None if room is None else room[3 * position : 3 * position + 3]
                computed = stage.forward(rows, target.weight, target.bias, window, own)
                saved += [computed.output, computed.convolved, computed.window]
                rows = computed.output
            last = self.stages[-1]
            # Converted as rows, of which there are fewer numbers.
            y = unpack(rows.to(self.dtype), last.output, last.tiles.batch, channels_last=self.channels_last)
        return y, saved

    def infer(self, x: Tensor) -> Tensor:
        """The result alone."""
        return self.forward(x)[0]

    def _packed(self, x: Tensor) -> Tensor:
        first = self.stages[0]
        return pack(x.detach(), first.source, first.tiles).to(first.dtype)

    @torch.no_grad()
    def backward(self, grad: Tensor, x: Tensor, saved: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of x and of every layer's weight, bias, loc and scale, as far as `needs` says, in their types.

        `saved`: as `forward` left it; without the packed input this is made anew.
        """
        room = saved[-3 * len(self.stages) :]
        packed = saved[0] if len(saved) > len(room) else self._packed(x)
        computed = [Computed(*room[3 * i : 3 * i + 3]) for i in range(len(self.stages))]
        inputs = [packed, *(one.output for one, _ in pairwise(computed))]
        last = self.stages[-1]
        results: list[Tensor | None] = [None] * len(needs)
        with torch.autocast("cpu", enabled=False):
            rows = pack(grad, last.output, last.tiles).to(last.dtype)
            for i in reversed(range(len(self.stages))):
                target, stage = self.targets[i], self.stages[i]
                mine = needs[1 + 4 * i : 5 + 4 * i]
                wanted = (any(needs[: 1 + 4 * i]), mine[0], mine[1], mine[2] or mine[3])
                grads = stage.backward(rows, inputs[i], target.weight, computed[i], wanted)
                results[1 + 4 * i : 3 + 4 * i] = grads.of_parameters(target.weight)
                if grads.window is not None:
                    of_window = window_gradients(target, stage.geometry.output_size, grads.window)
                    results[3 + 4 * i : 5 + 4 * i] = of_window
                if grads.x is None:
                    break
                rows = grads.x
            else:
                first, last_channels = self.stages[0], x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1
                results[0] = unpack(rows.to(x.dtype), first.source, first.tiles.batch, channels_last=last_channels)
        return [result if needed else None for result, needed in zip(results, needs, strict=True)]
