"""Looking at a layer's output, and changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: What a layer gives -> what goes on from there.
Change = Callable[[Tensor], Tensor]


@contextmanager
def hooked_outputs(layer: nn.Module, change: Change) -> Iterator[None]:
    """Within the context `change` is applied to whatever the layer gives, [B, C, *size]."""

    def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return change(output)

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
