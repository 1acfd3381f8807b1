"""Whether torch must follow each operation, because it records, compiles or transforms what is computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def torch_must_follow(x: object) -> bool:
    """Whether torch compiles, traces or transforms what is done to `x`, so that it must see operations of its own."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(x, Tensor):
        return True
    return type(x) not in (Tensor, nn.Parameter) or transformed()


def transformed() -> bool:
    """Whether a function transform (torch.func) or forward-mode differentiation is at work."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type in which autocast lets convolutions of `x` compute now; None: in its own."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
