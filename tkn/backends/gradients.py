"""What a layer's backward pass gives, whichever ROI backend computes it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gradients:
    """Of a layer: its input's rows, weight, bias, and the window [O, H, W]; None where not asked for."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    window: Tensor | None

    def of_parameters(self, weight: Tensor) -> list[Tensor | None]:
        """Of weight and bias, in the type of `weight`."""
        return [None if grad is None else grad.to(weight.dtype) for grad in (self.weight, self.bias)]
