"""A sequence of layers in which target layers hand their ROIs on to each other."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from tkn.backends.cpu.stage import Activation
from tkn.geometry import Pool, simple_pool
from tkn.layers import TargetConv2d
from tkn.ops.target import as_map, run_target


class TargetSequential(nn.Sequential):
    """`nn.Sequential`, with the same results, that lets the ROI engine compute a target layer and what follows it.

    A ReLU and a pooling after a target layer are computed with it, and a target layer after these multiplies only with
    the inputs that the ROIs of the layer before can reach. Forward hooks on a layer keep it from being joined.
    """

    def forward(self, input: Tensor) -> Tensor:
        layers = list(self)
        x: Tensor | Activation = input
        position = 0
        last: TargetConv2d | None = None
        while position < len(layers):
            layer = layers[position]
            if _is_target(layer):
                relu = _follows(layers, position + 1, nn.ReLU)
                pool = _pool(layers, position + 1 + relu)
                x = run_target(layer, x, relu=relu, pool=pool)
                position += 1 + relu + (pool is not None)
                last = layer
                continue
            x = layer(_tensor(x, last))
            position += 1
        return _tensor(x, last)


def _tensor(x: Tensor | Activation, computed_by: TargetConv2d | None) -> Tensor:
    if isinstance(x, Activation):
        assert computed_by is not None
        return as_map(computed_by, x)
    return x


def _is_target(layer: nn.Module) -> TypeGuard[TargetConv2d]:
    """Whether its forward is the one that the engine computes."""
    return isinstance(layer, TargetConv2d) and type(layer).forward is TargetConv2d.forward and not _hooked(layer)


def _hooked(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or bool(torch_module._has_any_global_hook())


def _follows(layers: list[nn.Module], position: int, kind: type[nn.Module]) -> bool:
    return position < len(layers) and type(layers[position]) is kind and not _hooked(layers[position])


def _pool(layers: list[nn.Module], position: int) -> Pool | None:
    """The pooling at `position` if its windows neither overlap nor leave the map."""
    for kind in (nn.MaxPool2d, nn.AvgPool2d):
        if _follows(layers, position, kind):
            return simple_pool(layers[position])
    return None
