"""An activation times a window, with gradients as fast as the product: torch's own take many times as long."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from tkn.tracing import torch_must_follow


def weigh(activation: Tensor, window: Tensor) -> Tensor:
    """activation [B, C, *size] or [C, *size] times window [C, *size], of the same type."""
    if activation.dim() == window.dim() or activation.device.type != "cpu" or torch_must_follow(activation):
        return activation * window
    return _Weigh.apply(activation, in_layout_of(window, activation))


def in_layout_of(window: Tensor, activation: Tensor) -> Tensor:
    """The window [C, *size] in the activation's memory format, or each product would jump through it."""
    return window.movedim(0, -1).contiguous().movedim(-1, 0) if _channels_last(activation) else window


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, window: Tensor) -> Tensor:
        needs_activation, needs_window = ctx.needs_input_grad
        ctx.save_for_backward(activation if needs_window else None, window if needs_activation else None)
        return activation * window

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        activation, window = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):  # in the forward's type
            return (
                None if window is None else grad * window,
                None if activation is None else sum_over_batch(grad * activation),
            )


def sum_over_batch(x: Tensor) -> Tensor:
    """[B, C, *size] -> [C, *size], by a matrix product: tens of times as fast as torch's sum over a first axis."""
    if _channels_last(x):
        return sum_over_batch(x.movedim(1, -1)).movedim(-1, 0)
    return (x.new_ones(1, len(x)) @ x.reshape(len(x), prod(x.shape[1:]))).view(x.shape[1:])


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and not x.is_contiguous()
