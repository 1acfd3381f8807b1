"""The widths of a network's layers as plain data, so that a narrowed network can be made again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

#: By a layer's name: (in, out, groups) of a convolution, (in, out) of a fully connected layer, (features) of a
#: normalisation.
Widths = Mapping[str, tuple[int, ...]]


def _width(module: nn.Module) -> tuple[int, ...] | None:
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return module.in_channels, module.out_channels, module.groups
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _NormBase):
        return (module.num_features,)
    if isinstance(module, nn.LayerNorm):
        return tuple(module.normalized_shape)
    return None


def changed_widths(base: nn.Module, narrowed: nn.Module) -> dict[str, tuple[int, ...]]:
    """The widths of the layers of `narrowed` that are not those of `base`, a network of the same modules."""
    before = {name: _width(module) for name, module in base.named_modules()}
    widths = {}
    for name, module in narrowed.named_modules():
        width = _width(module)
        if width is not None and width != before.get(name):
            widths[name] = width
    return widths


def resize_(model: nn.Module, widths: Widths) -> None:
    """Give layers of `model` these widths, with fresh parameters; in place. ValueError for a layer that is not there.

    Makes again what `changed_widths` tells of, if nothing but widths was changed.
    """
    modules = dict(model.named_modules())
    for name, width in widths.items():
        module = modules.get(name)
        present = None if module is None else _width(module)
        if module is None or present is None or len(present) != len(width):
            raise ValueError(f"the network has no layer {name!r} of widths {list(width)}")
        set_width(module, tuple(width))


@torch.no_grad()
def set_width(module: nn.Module, width: tuple[int, ...]) -> None:
    """Give one layer this width (see `Widths`), with fresh parameters; in place."""
    if isinstance(module, _ConvNd):
        module.in_channels, module.out_channels, module.groups = width
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        _resize_parameters(module, {"weight": shape, "bias": (module.out_channels,)})
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = width
        _resize_parameters(module, {"weight": width[::-1], "bias": (module.out_features,)})
    elif isinstance(module, _NormBase):
        (module.num_features,) = width
        _resize_parameters(module, dict.fromkeys(("weight", "bias", "running_mean", "running_var"), width))
    else:
        assert isinstance(module, nn.LayerNorm)
        module.normalized_shape = width
        _resize_parameters(module, dict.fromkeys(("weight", "bias"), width))
    module.reset_parameters()


def _resize_parameters(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        value = getattr(module, name)
        if isinstance(value, nn.Parameter):
            setattr(module, name, nn.Parameter(value.new_empty(shape), requires_grad=value.requires_grad))
        elif value is not None:
            setattr(module, name, value.new_empty(shape))
