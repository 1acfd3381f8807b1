"""What a layer with ROIs remembers of its forward passes: its map's size, and whether its projection was forgotten."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tkn.roi import project_
from tkn.tracing import torch_must_follow

#: What loc and scale may be beyond their limits and still count as projected, by whatever means.
_TOLERANCE = 1e-3


class RemembersPasses:
    """A mixin of layers that have loc and scale [dims, C]. Nothing is remembered of passes that torch compiles, traces
    or transforms, so these cost nothing."""

    loc: Tensor
    scale: Tensor
    training: bool
    min_size: tuple[int, ...]

    #: the spatial size of the layer's last map; None before its first pass
    map_size: tuple[int, ...] | None = None
    #: of loc and scale, when they were last seen: torch counts there how often a tensor was written to
    _versions: tuple[int, int] | None = None
    #: how often training passes found loc and scale changed since the last projection; -1: a warning was given
    _moves: int = 0

    def note_pass(self, size: tuple[int, ...]) -> None:
        """Remember that the layer made maps of `size`; warns if training has moved loc and scale out of their range.

        The range is looked at in the second, fourth, eighth, ... pass after changes without a projection alone: a look
        waits for a GPU, and whoever projects shall not pay.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not all(type(n) is int for n in size):
            return
        if self.map_size != size:
            self.map_size = size
        if not self.training or not torch.is_grad_enabled() or self._moves < 0 or not _readable(self.loc):
            return
        before, self._versions = self._versions, (self.loc._version, self.scale._version)
        # Those of a copy of the layer begin anew.
        if before is None or all(now <= then for now, then in zip(self._versions, before, strict=True)):
            return
        self._moves += 1
        if self._moves > 1 and self._moves & (self._moves - 1) == 0 and self._is_out_of_range(size):
            self._moves = -1
            warnings.warn(
                "loc or scale of a layer with ROIs has left its range: call tkn.project_(model) after each step of the "
                "optimiser",
                stacklevel=2,
            )

    def note_projection(self) -> None:
        """Remember that loc and scale are within their range."""
        if not torch.compiler.is_compiling() and _readable(self.loc):
            self._versions, self._moves = (self.loc._version, self.scale._version), 0

    def _is_out_of_range(self, size: tuple[int, ...]) -> bool:
        loc, scale = self.loc.detach().clone(), self.scale.detach().clone()
        project_(size, loc, scale, self.min_size)
        apart = torch.maximum((loc - self.loc).abs(), (scale - self.scale).abs()).max()
        return bool(apart > max(_TOLERANCE, 2 * torch.finfo(scale.dtype).eps))


def _readable(parameter: Tensor) -> bool:
    """Whether a look at the parameter's numbers and version would neither fail nor be recorded."""
    if torch_must_follow(parameter) or torch._C._len_torch_dispatch_stack() > 0 or parameter.is_inference():
        return False
    return not (parameter.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
