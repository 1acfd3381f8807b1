"""Modules as the engine's operations; what they can't be told by is left to torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tkn.geometry import Geometry
from tkn.layers import TargetConv1d, TargetConv2d
from tkn.plan.graph import Affine, Attention, ChannelNorm, Convolve, Node, Operation, Same, Size
from tkn.plan.lines import as_of_rows, is_convolution_of, whole_rows
from tkn.plan.nonlinearity import module_nonlinearity
from tkn.plan.resizing import resampling_operation
from tkn.roi import roi_bounds


def module_of_last(module: nn.Module, source: Node) -> Operation | None:
    """What a module does to a map whose channels it sees last."""
    assert source.size is not None
    if type(module) is nn.Linear:
        return Convolve(module.weight[:, :, None, None], module.bias, Geometry(source.size[1:], (1, 1)))
    if type(module) in (nn.Dropout, nn.Identity):
        return Same()
    if type(module) is nn.LayerNorm:
        return channel_norm(module, source)
    return module_nonlinearity(module)


def channel_norm(module: nn.LayerNorm, source: Node) -> ChannelNorm | None:
    channels = (source.size or (0,))[:1]
    if tuple(module.normalized_shape) != channels:
        return None
    scale, shift = (
        torch.full(channels, default, dtype=torch.float64, device="cpu") if given is None else given.double()
        for given, default in ((module.weight, 1.0), (module.bias, 0.0))
    )
    return ChannelNorm(scale, shift, module.eps)


def module_operation(module: nn.Module, source: Node, result: Size | None) -> Operation | None:
    assert source.size is not None
    if is_convolution_of(module, source):
        return convolution(module, source.size)
    if type(module) is nn.Linear and source.flat:
        channels, height, width = source.size
        weight = module.weight.reshape(-1, channels, height, width)
        return Convolve(weight, module.bias, Geometry((height, width), (height, width)))
    if type(module) in (nn.BatchNorm2d, nn.BatchNorm1d) and (not source.flat or source.size[1:] == (1, 1)):
        return _batch_norm(module)
    function = module_nonlinearity(module)
    if function is not None:
        return function
    if type(module) in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity):
        return Same()
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) in ((1, -1), (1, len(source.shape))):
        return Same()
    if type(module) is nn.LayerNorm and source.flat and source.size[1:] == (1, 1):
        return channel_norm(module, source)
    of_rows = as_of_rows(module) if source.line else module
    if result is not None and not source.flat and of_rows is not None:
        return resampling_operation(of_rows, source.size, result)
    return None


def convolution(module: nn.Conv1d | nn.Conv2d, size: Size) -> Convolve | None:
    """Of maps of `size`, which are padded already unless it pads with zeros; None if what follows it is not known."""
    geometry = Geometry.of_conv(module, size[1:])
    weight = module.weight.unsqueeze(2) if isinstance(module, nn.Conv1d) else module.weight
    if type(module) in (nn.Conv1d, nn.Conv2d):
        return Convolve(weight, module.bias, geometry, module.groups)
    if type(module) not in (TargetConv1d, TargetConv2d):
        return None
    assert isinstance(module, TargetConv1d | TargetConv2d)
    loc, scale = whole_rows(module.loc, module.scale)
    attention = Attention(loc, scale, module.attention, module.scale_unit, module.clip)
    if not _is_attention_of(attention, module, geometry.output_size):
        return None
    return Convolve(weight, module.bias, geometry, module.groups, attention)


def _is_attention_of(attention: Attention, module: TargetConv1d | TargetConv2d, size: tuple[int, ...]) -> bool:
    """Whether the layer's own windows and ROIs are these: they may have been given others."""
    own_size = size[-module.num_dims :]
    own, ours = module.window(own_size), attention.window(size)
    if not torch.allclose(own.view_as(ours), ours, rtol=1e-4, atol=1e-6, equal_nan=True):
        return False
    return not module.clip or torch.equal(module.rois(own_size), roi_bounds(own_size, module.loc, module.scale))


def _batch_norm(module: Any) -> Operation | None:
    if module.running_mean is None:
        return None
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.double()
    shift = -module.running_mean.double() * scale
    return Affine(scale, shift if module.bias is None else shift + module.bias.double())
