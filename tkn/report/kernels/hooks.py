"""Looking at what goes into a layer and comes out, and changing its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: What a layer gives -> what goes on from there.
Change = Callable[[Tensor], Tensor]
#: Is shown what a layer gets and what it gives.
See = Callable[[Tensor, Tensor], None]


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


@contextmanager
def seen_passes(layer: nn.Module, see: See) -> Iterator[None]:
    """Within the context `see` is shown the layer's input and output, both [B, C, *size], of every pass."""

    def hook(_layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        (given,) = (*inputs, *named.values())
        see(given, output)

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
