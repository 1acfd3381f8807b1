"""What target layers compute (Eqs. 13-17), by torch's own operations: dense convolution, window, zero outside the ROI.

Slow and obvious: every engine is held against it, and it is what torch sees wherever it must follow each operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.backends.torch.masked import convolve, pooled
from tkn.backends.torch.weigh import in_layout_of, sum_over_batch
from tkn.spec import Target, TargetSpec
from tkn.tracing import torch_must_follow
from tkn.windows import kept_window, readable, target_window, window_gradients


def reference(x: Tensor, targets: Sequence[Target], *, fourier: bool = False) -> Tensor:
    """The layers one after the other, each with the ReLU and the pooling that its spec joins to it.

    x [B, C, *size] or [C, *size] -> [B, O, *size'] or [O, *size']; gradients of any order by torch's autograd.
    `fourier`: convolutions of many channels in the frequency domain where that is faster.
    """
    for target in targets:
        y = convolve(x, target, fourier=fourier)
        y = weigh_by_window(y, target)
        if target.spec.relu:
            y = F.relu(y)
        if target.spec.pool is not None:
            y = pooled(y, target.spec.pool)
        x = y
    return x


def weigh_by_window(y: Tensor, target: Target) -> Tensor:
    """The convolution's result [B, O, *size] or [O, *size] times the window, zero outside the ROIs if it clips."""
    if y.dim() == target.spec.dims + 2 and not target.per_image and not torch_must_follow(y) and readable(target):
        return _ByWindow.apply(y, target.loc, target.scale, target.spec)
    return y * target_window(target, tuple(y.shape[-target.spec.dims :])).to(y.dtype)


class _ByWindow(torch.autograd.Function):
    """With a window that is kept while its parameters stay, and gradients that take a few operations."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loc: Tensor, scale: Tensor, spec: TargetSpec) -> Tensor:
        target = Target(spec, y, None, loc, scale)
        window = in_layout_of(kept_window(target, tuple(y.shape[2:]), y.dtype), y)
        of_window = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(y if of_window else None, window, loc, scale)
        ctx.spec = spec
        return y * window

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, window, loc, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # gradients of these gradients are asked for
            return *_followed(grad, (y, loc, scale), ctx.spec, needs), None
        grad_loc = grad_scale = None
        with torch.autocast("cpu", enabled=False):  # in the forward's type
            if y is not None:
                inside = sum_over_batch(grad * y)
                if ctx.spec.clip:
                    inside = inside * (window != 0)
                wide = inside if inside.dtype == torch.float64 else inside.float()
                grad_loc, grad_scale = window_gradients(Target(ctx.spec, y, None, loc, scale), y.shape[2:], wide)
            grad_y = grad * window if needs[0] else None
        return grad_y, grad_loc if needs[1] else None, grad_scale if needs[2] else None, None


def _followed(
    grad: Tensor, inputs: tuple[Tensor | None, Tensor, Tensor], spec: TargetSpec, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of y, loc and scale, with gradients of their own."""
    y, loc, scale = inputs
    window = target_window(Target(spec, loc, None, loc, scale), tuple(grad.shape[2:])).to(grad.dtype)
    of_y = grad * window if needs[0] else None
    of_rest: list[Tensor | None] = [None, None]
    if y is not None:
        wanted = [t for t, needed in zip((loc, scale), needs[1:], strict=True) if needed]
        found = iter(torch.autograd.grad(window, wanted, (grad * y).sum(0), create_graph=True, allow_unused=True))
        of_rest = [next(found) if needed else None for needed in needs[1:]]
    return [of_y, *of_rest]
