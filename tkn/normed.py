"""Batch normalisations, ReLUs and target convolutions one after the other: in one operation where that is faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tkn.layers import TargetConv2d
from tkn.ops.normed import usable
from tkn.ops.operator import by_torch
from tkn.sequential import hooked

#: The layers that are joined.
_KINDS = [nn.BatchNorm2d, nn.ReLU, TargetConv2d]


def normed_sequential(layers: nn.Sequential, x: Tensor) -> Tensor:
    """What `layers(x)` gives.

    In training under bfloat16 autocast on the CPU a batch normalisation, a ReLU and a 3x3 target convolution with
    engine="roi" after each other are one operation, of contiguous maps [B, C, H, W], if nothing hooks into them.
    """
    if not isinstance(x, Tensor) or hooked(layers):
        return layers(x)
    left = list(layers)
    while left:
        joined = _joined(left[:3], x)
        if joined is None:
            x, left = left[0](x), left[1:]
        else:
            x, left = joined, left[3:]
    return x


def joins(layers: nn.Sequential) -> bool:
    """Whether `normed_sequential` joins some of these layers, where they train as it says."""
    children = list(layers)
    triples = (children[at : at + 3] for at in range(len(children) - 2))
    return any([type(layer) for layer in three] == _KINDS and _knows(three[2]) for three in triples)


def _joined(layers: list[nn.Module], x: Tensor) -> Tensor | None:
    """The three layers as one operation, and the running statistics moved; None if they are no such layers."""
    if [type(layer) for layer in layers] != _KINDS or any(hooked(layer) for layer in layers):
        return None
    norm, _, conv = layers
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(conv, TargetConv2d)
    parameters = norm.weight, norm.bias, conv.weight, conv.loc, conv.scale
    mean, var, count, momentum = norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum
    if mean is None or var is None or count is None or momentum is None or not (norm.training and norm.affine):
        return None
    if not _knows(conv) or x.dim() != 4 or not x.shape[1] == norm.num_features == conv.in_channels:
        return None
    if not _takes(x, parameters) or by_torch(conv.operator_engine(), x) or not usable():
        return None
    conv.note_pass(tuple(x.shape[2:]))
    y, batch_mean, batch_var = torch.ops.tkn.normed_conv(x, *parameters, norm.eps, conv.attention, conv.scale_unit)
    with torch.no_grad():
        numbers = x.numel() // x.shape[1]
        count.add_(1)
        mean.lerp_(batch_mean.to(mean.dtype), momentum)
        var.lerp_(batch_var.to(var.dtype) * (numbers / (numbers - 1)), momentum)
    return y


def _knows(conv: nn.Module) -> bool:
    assert isinstance(conv, TargetConv2d)
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    plain = geometry == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == 1 and conv.padding_mode == "zeros"
    return plain and conv.bias is None and conv.clip and conv.engine == "roi"


def _takes(x: Tensor, parameters: tuple[Tensor, ...]) -> bool:
    """Whether the kernels take tensors of these types, and nothing but a compiler watches them."""
    watched = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
    return (
        not watched
        and all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in (x, *parameters))
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == x.dtype == torch.bfloat16
        and all(t.dtype == torch.float32 for t in parameters)
        and x.is_contiguous()
        and x.numel() > x.shape[1]  # of one number torch says what is wrong
    )
