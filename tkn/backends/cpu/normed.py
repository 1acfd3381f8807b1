"""A batch normalisation, a ReLU and a 3x3 target convolution in one, of bfloat16 maps: the kernels of csrc/normed.h."""

from __future__ import annotations

from ctypes import CDLL, byref

import torch
from torch import Tensor

from tkn.backends.cpu import build
from tkn.backends.cpu.build import kernels
from tkn.backends.cpu.structs import Filled, NormedConvStruct, address
from tkn.spec import Target
from tkn.windows import kept_bounds, kept_window, window_gradients


def available(*, may_build: bool) -> bool:
    """Whether there are such kernels here; `may_build`: compile and check all kernels if that was not done yet."""
    return build.available(torch.float32, may_build=may_build) and bool(kernels(torch.float32).tkn_bfloat16())


def _kernels() -> CDLL:
    if not available(may_build=True):
        raise build.EngineUnavailable("there are no products of bfloat16 here")
    return kernels(torch.float32)


def forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, target: Target
) -> tuple[Tensor, Tensor, Tensor]:
    """x bfloat16 [B, C, H, W] -> y bfloat16 [B, O, H, W], and the batch's mean and biased variance, float32 [C]."""
    x = x.contiguous()
    mean, variance = torch.empty_like(norm_weight), torch.empty_like(norm_weight)
    shape = _shape(x, target)
    loaded, threads = _kernels(), torch.get_num_threads()
    loaded.tkn_normed_statistics(byref(shape.struct), address(mean), address(variance), threads)
    y = x.new_empty(len(x), len(target.weight), *x.shape[2:])
    op = _normalising(shape, mean, variance, norm_weight, norm_bias, eps)
    op = op.with_values(weight=_pairs(target.weight), y=y)
    loaded.tkn_normed_forward(byref(op.struct), threads)
    return y, mean, variance


def backward(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    statistics: tuple[Tensor, Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    target: Target,
) -> list[Tensor]:
    """The gradients of x, norm_weight, norm_bias, weight, loc and scale. `y`, `statistics`: what `forward` gave."""
    x, grad = x.contiguous(), grad.contiguous()
    grad_x, grad_weight = torch.empty_like(x), target.weight.new_empty(target.weight.shape)
    grad_factor, grad_shift = torch.empty_like(norm_weight), torch.empty_like(norm_weight)
    window = grad_weight.new_empty(len(target.weight), *x.shape[2:])
    op = _normalising(_shape(x, target), *statistics, norm_weight, norm_bias, eps)
    op = op.with_values(
        turned=_pairs(target.weight.flip(2, 3).transpose(0, 1)),
        y=y,
        grad_y=grad,
        grad_x=grad_x,
        grad_factor=grad_factor,
        grad_shift=grad_shift,
        grad_weight=grad_weight,
        grad_window=window,
    )
    _kernels().tkn_normed_backward(byref(op.struct), torch.get_num_threads())
    with torch.autocast("cpu", enabled=False):
        of_window = window_gradients(target, tuple(x.shape[2:]), window)
    return [grad_x, grad_factor, grad_shift, grad_weight, *of_window]


def _shape(x: Tensor, target: Target) -> Filled:
    size = tuple(x.shape[2:])
    bounds = kept_bounds(target, size)
    assert bounds is not None
    return Filled(NormedConvStruct()).with_values(
        batch=len(x),
        channels=x.shape[1],
        outputs=len(target.weight),
        height=size[0],
        width=size[1],
        x=x,
        roi=bounds.rois.flatten(1).int(),
        window=kept_window(target, size, torch.float32, masked=False),
    )


def _normalising(
    op: Filled, mean: Tensor, variance: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Filled:
    rstd = (variance + eps).rsqrt()
    factor = norm_weight.detach() * rstd
    return op.with_values(mean=mean, rstd=rstd, factor=factor, shift=norm_bias.detach() - mean * factor)


def _pairs(weight: Tensor) -> Tensor:
    """[A, B, 3, 3] -> bfloat16 [A, ceil(B / 2), 9, 2]: the taps of two B beside each other, an odd one's with zeros."""
    outer, inner = weight.shape[:2]
    pairs = torch.zeros(outer, (inner + 1) // 2, 9, 2, dtype=torch.bfloat16, device="cpu")
    taps = weight.detach().flatten(2)
    pairs[..., 0] = taps[:, 0::2]
    pairs[:, : inner // 2, :, 1] = taps[:, 1::2]
    return pairs
