"""Modules as torch.autograd's checks want them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.func import functional_call


def as_function(module: nn.Module) -> Callable[..., Tensor]:
    """What gives the module's output, of an input and of the module's parameters in their order."""
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        output: Tensor = functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return output

    return function
