"""The dense network that a targeted one stands for: what its ROIs are compared with."""

from __future__ import annotations

import copy

from torch import nn

from tkn.layers import RoiLayer, TargetConv1d, TargetConv2d, TargetConv3d, roi_layers
from tkn.sequential import TargetSequential

_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    TargetConv1d: nn.Conv1d,
    TargetConv2d: nn.Conv2d,
    TargetConv3d: nn.Conv3d,
}


def densified(model: nn.Module) -> nn.Module:
    """A copy without windows and ROIs: target layers are convolutions of their weights, regularizations nothing.

    It computes other numbers than `model`, which learned with its windows; it says what `model` would cost without.
    """
    dense = copy.deepcopy(model)
    for name, layer in roi_layers(dense).items():
        kind = next((plain for target, plain in _CONVOLUTIONS.items() if isinstance(layer, target)), None)
        if kind is not None:
            _become(layer, kind)
        elif not name:
            return nn.Identity()
        else:
            parent, _, child = name.rpartition(".")
            setattr(dense.get_submodule(parent), child, nn.Identity())
    for module in dense.modules():
        if type(module) is TargetSequential:
            module.__class__ = nn.Sequential  # type: ignore[assignment]
    vars(dense).pop("no_weight_decay", None)  # that `targetize` gave it, of loc and scale
    return dense


def _become(layer: RoiLayer, kind: type[nn.Module]) -> None:
    """The other way from `targetize`: the layer stays the same object, with its hooks and its weights."""
    for name in ("loc", "scale"):
        del layer._parameters[name]
    layer.__class__ = kind  # type: ignore[assignment]
