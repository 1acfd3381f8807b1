"""A network in evaluation for a while, and as it was after that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context `model` is in evaluation mode and nothing has gradients."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def zeros_for(model: nn.Module, size: tuple[int, ...]) -> Tensor:
    """One input of zeros [1, *size] in the type and on the device of the model's parameters."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros((), device="cpu"))
    return torch.zeros(1, *size, dtype=like.dtype, device=like.device)
