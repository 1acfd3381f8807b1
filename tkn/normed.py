"""Batch normalisations, ReLUs and target convolutions one after the other: in one operation where that is faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tkn.layers import TargetConv2d
from tkn.ops.normed import usable
from tkn.ops.operator import by_torch
from tkn.sequential import hooked
from tkn.tracing import autocast_dtype


def normed_sequential(layers: nn.Sequential, x: Tensor) -> Tensor:
    """What `layers(x)` gives. In training under bfloat16 autocast on the CPU a batch normalisation, a ReLU and a 3x3 target
    convolution after each other are one operation, of contiguous maps [B, C, H, W], if nothing hooks into them."""
    if not isinstance(x, Tensor) or hooked(layers):
        return layers(x)
    left = list(layers)
    while left:
        norm, relu, conv = (*left[:3], None, None)[:3]
        if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, TargetConv2d) and _joins(norm, relu, conv, x):
            x, left = _joined(norm, conv, x), left[3:]
        else:
            x, left = left[0](x), left[1:]
    return x


def _joins(norm: nn.BatchNorm2d, relu: nn.Module | None, conv: TargetConv2d, x: Tensor) -> bool:
    kinds = type(norm) is nn.BatchNorm2d, type(relu) is nn.ReLU, type(conv) is TargetConv2d
    return (
        all(kinds)
        and not any(hooked(layer) for layer in (norm, relu, conv))
        and _knows_norm(norm)
        and _knows_conv(conv)
        and _knows_maps(x, (norm.weight, norm.bias, conv.weight, conv.loc, conv.scale))
        and x.shape[1] == norm.num_features == conv.in_channels
        and not by_torch(conv.operator_engine(), x)
        and usable()
    )


def _knows_norm(norm: nn.BatchNorm2d) -> bool:
    """Whether it normalises by the batch, and keeps a moving average."""
    return norm.training and norm.affine and norm.track_running_stats and norm.momentum is not None


def _knows_conv(conv: TargetConv2d) -> bool:
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    plain = geometry == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == 1 and conv.padding_mode == "zeros"
    return plain and conv.bias is None and conv.clip and conv.engine == "roi"


def _knows_maps(x: Tensor, parameters: tuple[Tensor, ...]) -> bool:
    """Whether x and the parameters are of the types that the kernels take, and nothing but a compiler watches them."""
    watched = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
    kinds = (type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in (x, *parameters))
    return (
        not watched
        and all(kinds)
        and autocast_dtype(x) == x.dtype == torch.bfloat16
        and all(t.dtype == torch.float32 for t in parameters)
        and x.dim() == 4
        and x.is_contiguous()
        and x.numel() > x.shape[1]  # of one number torch says what is wrong
    )


def _joined(norm: nn.BatchNorm2d, conv: TargetConv2d, x: Tensor) -> Tensor:
    parameters = norm.weight, norm.bias, conv.weight, conv.loc, conv.scale
    y, mean, variance = torch.ops.tkn.normed_conv(x, *parameters, norm.eps, conv.attention, conv.scale_unit)
    with torch.no_grad():
        count = x.numel() // x.shape[1]
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    return y
