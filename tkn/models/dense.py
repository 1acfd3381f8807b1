"""The dense network that a targeted one stands for: what its ROIs are compared with."""

from __future__ import annotations

import copy

from torch import nn

from tkn.layers import TargetConvNd, roi_layers
from tkn.sequential import TargetSequential
from tkn.several import PartsConvNd

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def densified(model: nn.Module) -> nn.Module:
    """A copy without windows and ROIs: target layers are convolutions of their weights, regularizations nothing.

    Parts of one output channel are one kernel, their sum. It computes other numbers than `model`, which learned with
    its windows; it says what `model` would cost without.
    """
    dense = copy.deepcopy(model)
    for name, layer in roi_layers(dense).items():
        if isinstance(layer, TargetConvNd):
            _become_dense(layer)
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


def _become_dense(layer: TargetConvNd) -> None:
    """The other way from `targetize`: the layer stays the same object, with its hooks and its weights."""
    if isinstance(layer, PartsConvNd):
        layer.join_kernels_()
    layer._modules.pop("locator", None)
    for name in ("loc", "scale"):
        del layer._parameters[name]
    layer.__class__ = _CONVOLUTIONS[layer.num_dims]  # type: ignore[assignment]
