"""Whether torch records or transforms operations instead of running them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def followed(x: object) -> bool:
    """Whether torch records or transforms operations instead of running them: it must see its own."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(x, Tensor):
        return True
    if forward_ad._current_level >= 0:  # within forward_ad.dual_level()
        return True
    return type(x) not in (Tensor, nn.Parameter) or torch._C._functorch.peek_interpreter_stack() is not None
