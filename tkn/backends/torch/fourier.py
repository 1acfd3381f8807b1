"""Dense convolutions of many channels in the frequency domain, for training: fewer multiply-adds than tap by tap.

A convolution is a product at every frequency. Of a real map's frequencies half tell all, a product of complex numbers
takes three of real ones (Gauss), and transforms of maps this small are matrix products. So batched matrix products are
all there is to compute: for 5x5 kernels on 14x14 maps eleven times fewer multiply-adds, beside the transforms'.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tkn.tracing import torch_must_follow

#: With fewer channels in or out the transforms cost more than the products save.
LEAST_CHANNELS = 128
#: How many times fewer multiply-adds must be left for them to take less time (measured: torch does its own faster).
_LEAST_SAVING = 2
#: So many images' multiply-adds take as long as reading and writing the kernels' frequencies.
_READING = 32


@dataclass(frozen=True)
class _Transform:
    """A linear map [rows, columns, ...] -> [frequencies, ...], or back: along the rows, then along the columns.

    `rows` [2F, H] makes real and imaginary parts of F frequencies; `columns` [F, 3 Nw, 2 W] makes of these the real
    part, the imaginary part and their sum, or of three products what they are of, at all Nw frequencies of the columns.
    """

    rows: Tensor
    columns: Tensor

    @property
    def pixels(self) -> int:
        """H * W"""
        return self.rows.shape[1] * self.columns.shape[2] // 2

    @property
    def products(self) -> int:
        """F * 3 Nw"""
        return self.columns.shape[0] * self.columns.shape[1]

    def macs(self, maps: int) -> int:
        """The multiply-adds for so many maps."""
        return maps * (self.rows.numel() * (self.columns.shape[2] // 2) + self.columns.numel())

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

    def are_faster(self, batch: int, channels: int, outputs: int) -> bool:
        """Whether the frequencies of a batch take less time than the taps, estimated by multiply-adds."""
        pairs = channels * outputs
        products = self.output.products * (batch + _READING) * pairs
        maps = self.input.macs(batch * channels) + self.output.macs(batch * outputs) + self.kernel.macs(pairs)
        return _LEAST_SAVING * (products + maps) < self.kernel.pixels * self.output.pixels * batch * pairs


def _angles(count: int, period: int, positions: Tensor) -> Tensor:
    """[count, positions]: of the first `count` frequencies of maps `period` long."""
    return 2 * pi / period * torch.outer(torch.arange(count), positions).double()


@lru_cache(maxsize=64)
def _transforms(
    size: tuple[int, int], kernel: tuple[int, int], padding: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> _Transforms:
    # What wraps around reaches only the padding.
    height, width = (n + p for n, p in zip(size, padding, strict=True))
    output = [n + 2 * p - k + 1 for n, k, p in zip(size, kernel, padding, strict=True)]
    frequencies = height // 2 + 1
    # torch's convolution is a correlation: tap t stands for a kernel's value at padding - t.
    taps = [p - torch.arange(k) for k, p in zip(kernel, padding, strict=True)]

    def axes(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Parts of the rows' frequencies [F, 2, H]; of these the columns' real and imaginary parts, [Nw, 2 W] each."""
        down, across = _angles(frequencies, height, rows), _angles(width, width, columns)
        real = torch.cat((across.cos(), across.sin()), dim=1)
        imaginary = torch.cat((-across.sin(), across.cos()), dim=1)
        return torch.stack((down.cos(), -down.sin()), dim=1), real, imaginary

    def transform(parts: Tensor, *columns: Tensor) -> _Transform:
        repeated = torch.cat(columns).to(device, dtype).expand(frequencies, -1, -1)
        return _Transform(parts.flatten(0, 1).to(device, dtype), repeated)

    def analysis(rows: Tensor, columns: Tensor) -> _Transform:
        parts, real, imaginary = axes(rows, columns)
        return transform(parts, real, imaginary, real + imaginary)

    def synthesis(rows: Tensor, columns: Tensor) -> _Transform:
        parts, real, imaginary = axes(rows, columns)
        # All but the first frequency, and the middle one, stand for their conjugates too.
        both = torch.tensor([1 if 2 * k % height == 0 else 2 for k in range(frequencies)])
        # Of the products p, q, r: real part p - q, imaginary part r - p - q.
        return transform(both[:, None, None] * parts / (height * width), real - imaginary, -real - imaginary, imaginary)

    return _Transforms(analysis(*map(torch.arange, size)), analysis(*taps), synthesis(*map(torch.arange, output)))


class _FourierConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transforms: _Transforms, padding: tuple[int, int]) -> Tensor:
        inputs = transforms.input(x.permute(2, 3, 0, 1))
        weights = transforms.kernel(weight.permute(2, 3, 1, 0))
        needs_x, needs_weight, _, _ = ctx.needs_input_grad
        # x and weight themselves for gradients of gradients alone.
        ctx.save_for_backward(inputs if needs_weight else None, weights if needs_x else None, x, weight)
        ctx.transforms, ctx.padding = transforms, padding
        return _as_map(transforms.output.transposed(torch.bmm(inputs, weights)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        inputs, weights, x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of these are asked for: torch's own have them
            wanted = [*ctx.needs_input_grad[:2], False]
            one, padding = [1, 1], list(ctx.padding)
            backward = torch.ops.aten.convolution_backward
            grads = backward(grad, x, weight, None, one, padding, one, False, [0, 0], 1, wanted)
            return grads[0], grads[1], None, None
        transforms: _Transforms = ctx.transforms
        grad_x = grad_weight = None
        with torch.autocast(grad.device.type, enabled=False):  # in the forward's type
            grads = transforms.output(grad.permute(2, 3, 0, 1))
            if weights is not None:
                grad_x = _as_map(transforms.input.transposed(torch.bmm(grads, weights.mT)))
            if inputs is not None:
                grad_weight = transforms.kernel.transposed(torch.bmm(inputs.mT, grads)).permute(3, 2, 0, 1)
        return grad_x, grad_weight, None, None


def _as_map(x: Tensor) -> Tensor:
    """[H, W, B, C] -> [B, C, H, W] in channels-last memory format"""
    return x.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


def fourier_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """`torch.nn.functional.conv2d` up to rounding: x [B, C, H, W], weight [O, C, kH, kW], bias [O] -> [B, O, H', W'].

    Stride 1, no dilation, no groups, zeros around: fewer than the kernel is long, else ValueError, as for maps smaller
    than the kernel. The result is in channels-last memory format. Under autocast it computes
    in autocast's type, as torch does; bfloat16 is rounded twice as much as tap by tap.
    """
    kernel, size = tuple(weight.shape[2:]), tuple(x.shape[2:])
    if not _possible(size, kernel, padding):
        raise ValueError(f"a kernel of {kernel} pixels with padding={padding} does not fit maps of {size}")
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return fourier_conv2d(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), padding)
    y = _FourierConvolution.apply(x, weight, _transforms(size, kernel, padding, x.dtype, x.device), padding)
    return y if bias is None else y + bias[:, None, None]


def _possible(size: tuple[int, ...], kernel: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    return all(p < k <= n + 2 * p for n, k, p in zip(size, kernel, padding, strict=True))


def convolve_by_frequencies(x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int) -> Tensor:
    """`torch.nn.functional.conv2d` with padding (top, left), in the frequency domain where that is faster."""
    if _is_faster(x, weight, (top, left)):
        return fourier_conv2d(x, weight, bias, (top, left))
    return F.conv2d(x, weight, bias, padding=(top, left))


def _is_faster(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> bool:
    # On a GPU it was not tried; torch's own errors, and its unbatched inputs.
    if x.device.type != "cpu" or torch_must_follow(x) or x.dim() != 4 or x.shape[1] != weight.shape[1] or 0 in x.shape:
        return False
    kernel, size = tuple(weight.shape[2:]), tuple(x.shape[2:])
    if not _possible(size, kernel, padding):
        return False
    return _transforms(size, kernel, padding, x.dtype, x.device).are_faster(len(x), x.shape[1], len(weight))


class _Forward:
    """Takes the place of a layer's `_conv_forward`."""

    def __init__(self, layer: nn.Conv2d) -> None:
        assert isinstance(layer.padding, tuple)
        self.padding = (layer.padding[0], layer.padding[1])

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve_by_frequencies(x, weight, bias, *self.padding)


def suited(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The model's convolutions, targeted or not, that `use_fourier` changes, by name.

    Those with at least `LEAST_CHANNELS` channels in and out, kernels larger than 1x1, stride 1, no dilation, no groups
    and a padding by zeros smaller than the kernel.
    """
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and _applies_to(layer)}


def use_fourier(model: nn.Module) -> None:
    """Let the `suited` convolutions, as they are now, compute in the frequency domain on the CPU where it pays.

    It does for large batches, large kernels and small maps; else, and where torch follows what is computed, they are
    torch's. Of a target layer it is the dense convolution before the mask.
    """
    for layer in suited(model).values():
        layer._conv_forward = _Forward(layer)  # type: ignore[assignment]


def uses_fourier(layer: object) -> bool:
    """Whether `use_fourier` changed this layer."""
    return isinstance(getattr(layer, "_conv_forward", None), _Forward)


def _applies_to(layer: nn.Conv2d) -> bool:
    plain = layer.stride == layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"
    return (
        plain
        and min(layer.in_channels, layer.out_channels) >= LEAST_CHANNELS
        and layer.kernel_size != (1, 1)
        and isinstance(layer.padding, tuple)
        and all(padding < kernel for padding, kernel in zip(layer.padding, layer.kernel_size, strict=True))
        and type(layer)._conv_forward is nn.Conv2d._conv_forward
    )
