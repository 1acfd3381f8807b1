"""Dense convolutions of many channels in the frequency domain, for training: fewer multiply-adds than tap by tap.

A convolution is a product at every frequency. Of a real map's frequencies half tell all, a product of complex numbers
takes three of real ones (Gauss), and transforms of maps this small are matrix products. So batched matrix products are
all there is to compute: for 5x5 kernels on 14x14 maps eleven times fewer multiply-adds, beside the transforms'.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tkn.engine.choose import followed

#: With fewer channels in or out the transforms cost more than the products save.
LEAST_CHANNELS = 128


@dataclass(frozen=True)
class _Transform:
    """A linear map [rows, columns, ...] -> [frequencies, ...], or back: along the rows, then along the columns.

    `rows` [2F, H] makes real and imaginary parts of F frequencies; `columns` [F, 3 Nw, 2 W] makes of these the real
    part, the imaginary part and their sum, or of three products what they are of, at all Nw frequencies of the columns.
    """

    rows: Tensor
    columns: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[H, W, M, N] -> [F * 3 Nw, M, N]"""
        _, _, *last = x.shape
        along = self.rows @ x.reshape(len(x), -1)
        return torch.bmm(self.columns, along.view(*self.columns.shape[::2], -1)).view(-1, *last)

    def transposed(self, x: Tensor) -> Tensor:
        """[F * 3 Nw, M, N] -> [H, W, M, N]: the gradient of a call, and the way back from frequencies."""
        _, *last = x.shape
        along = torch.bmm(self.columns.mT, x.reshape(*self.columns.shape[:2], -1))
        return (self.rows.mT @ along.view(len(self.rows), -1)).view(self.rows.shape[1], -1, *last)


@dataclass(frozen=True)
class _Transforms:
    """Those of inputs, of kernels, and (transposed) of outputs."""

    input: _Transform
    kernel: _Transform
    output: _Transform


def _angles(count: int, period: int, positions: Tensor) -> Tensor:
    """[count, positions]: of the first `count` frequencies of maps `period` long."""
    return 2 * pi / period * torch.outer(torch.arange(count), positions).double()


@cache
def _transforms(
    size: tuple[int, int], kernel: tuple[int, int], padding: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> _Transforms:
    # What wraps around reaches only the padding.
    height, width = (n + p for n, p in zip(size, padding, strict=True))
    output = [n + 2 * p - k + 1 for n, k, p in zip(size, kernel, padding, strict=True)]
    frequencies = height // 2 + 1
    # torch's convolution is a correlation: tap t stands for a kernel's value at padding - t.
    taps = [p - torch.arange(k) for k, p in zip(kernel, padding, strict=True)]

    def transform(rows: Tensor, columns: Tensor) -> _Transform:
        repeated = columns.to(device, dtype).repeat(frequencies, 1, 1)
        return _Transform(rows.to(device, dtype), repeated)

    def analysis(rows: Tensor, columns: Tensor) -> _Transform:
        down, across = _angles(frequencies, height, rows), _angles(width, width, columns)
        real = torch.cat((across.cos(), across.sin()), dim=1)
        imaginary = torch.cat((-across.sin(), across.cos()), dim=1)
        parts = torch.stack((down.cos(), -down.sin()), dim=1)
        return transform(parts.flatten(0, 1), torch.cat((real, imaginary, real + imaginary)))

    def synthesis() -> _Transform:
        down = _angles(frequencies, height, torch.arange(output[0]))
        across = _angles(width, width, torch.arange(output[1]))
        # All but the first frequency, and the middle one, stand for their conjugates too.
        both = torch.tensor([1 if 2 * k % height == 0 else 2 for k in range(frequencies)])[:, None]
        parts = torch.stack((both * down.cos(), -both * down.sin()), dim=1) / (height * width)
        real = torch.cat((across.cos(), across.sin()), dim=1)
        imaginary = torch.cat((-across.sin(), across.cos()), dim=1)
        # Of the products p, q, r: real part p - q, imaginary part r - p - q.
        return transform(parts.flatten(0, 1), torch.cat((real - imaginary, -real - imaginary, imaginary)))

    return _Transforms(analysis(torch.arange(size[0]), torch.arange(size[1])), analysis(*taps), synthesis())


class _FourierConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        kernel, size = weight.shape[2:], x.shape[2:]
        transforms = _transforms(tuple(size), tuple(kernel), padding, x.dtype, x.device)
        inputs = transforms.input(x.permute(2, 3, 0, 1))
        weights = transforms.kernel(weight.permute(2, 3, 1, 0))
        ctx.save_for_backward(inputs, weights)
        ctx.transforms = transforms
        return _as_map(transforms.output.transposed(torch.bmm(inputs, weights)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, weights = ctx.saved_tensors
        transforms: _Transforms = ctx.transforms
        grads = transforms.output(grad.permute(2, 3, 0, 1))
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _as_map(transforms.input.transposed(torch.bmm(grads, weights.mT)))
        if ctx.needs_input_grad[1]:
            grad_weight = transforms.kernel.transposed(torch.bmm(inputs.mT, grads)).permute(3, 2, 0, 1)
        return grad_x, grad_weight, None


def _as_map(x: Tensor) -> Tensor:
    """[H, W, B, C] -> [B, C, H, W] in channels-last memory format"""
    return x.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


def fourier_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """`torch.nn.functional.conv2d` up to rounding: x [B, C, H, W], weight [O, C, kH, kW], bias [O] -> [B, O, H', W'].

    Stride 1, no dilation, no groups, zeros around. The result is in channels-last memory format. Under autocast it
    computes in autocast's type; bfloat16 rounds twice as much as in a convolution tap by tap.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return fourier_conv2d(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), padding)
    y = _FourierConvolution.apply(x, weight, padding)
    return y if bias is None else y + bias[:, None, None]


class _Forward:
    """Takes the place of a layer's `_conv_forward`."""

    def __init__(self, layer: nn.Conv2d) -> None:
        assert isinstance(layer.padding, tuple)
        self.padding = (layer.padding[0], layer.padding[1])

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # On a GPU it was not tried; torch's own errors, and its unbatched inputs.
        if x.device.type != "cpu" or followed(x) or x.dim() != 4 or x.shape[1] != weight.shape[1] or 0 in x.shape:
            return F.conv2d(x, weight, bias, padding=self.padding)
        return fourier_conv2d(x, weight, bias, self.padding)


def use_fourier(model: nn.Module) -> list[str]:
    """Let the model's convolutions of many channels, targeted or not, compute in the frequency domain on the CPU.

    Those with kernels larger than 1x1, at least `LEAST_CHANNELS` channels in and out, stride 1, no dilation, no groups
    and a padding by zeros smaller than the kernel. Of a target layer it is the dense convolution before the mask.
    Returns their names.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and _suits(layer)}
    for layer in layers.values():
        layer._conv_forward = _Forward(layer)  # type: ignore[assignment]
    return list(layers)


def uses_fourier(layer: object) -> bool:
    """Whether `use_fourier` was called on this layer."""
    return isinstance(getattr(layer, "_conv_forward", None), _Forward)


def _suits(layer: nn.Conv2d) -> bool:
    plain = layer.stride == layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"
    return (
        plain
        and min(layer.in_channels, layer.out_channels) >= LEAST_CHANNELS
        and layer.kernel_size != (1, 1)
        and isinstance(layer.padding, tuple)
        and all(padding < kernel for padding, kernel in zip(layer.padding, layer.kernel_size, strict=True))
        and type(layer)._conv_forward is nn.Conv2d._conv_forward
    )
