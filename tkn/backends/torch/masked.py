"""Target layers by torch, dense and then masked, with their gradients in formulas: for where autograd can't reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.backends.torch.fourier import convolve_by_frequencies
from tkn.backends.torch.weigh import sum_over_batch
from tkn.geometry import Pool
from tkn.spec import Target
from tkn.windows import kept_window, window_gradients

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MEANS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMA = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_aten = torch.ops.aten
_MEANS_BACKWARD = {2: _aten.avg_pool2d_backward, 3: _aten.avg_pool3d_backward}
_INDICES = {2: _aten.max_pool2d_with_indices, 3: _aten.max_pool3d_with_indices}
_MAXIMA_BACKWARD = {2: _aten.max_pool2d_with_indices_backward, 3: _aten.max_pool3d_with_indices_backward}


def convolve(x: Tensor, target: Target, *, fourier: bool = False) -> Tensor:
    """The dense convolution: [B, C, *size] or [C, *size] -> [B, O, *size'] or [O, *size'].

    `fourier`: of many channels in the frequency domain where that is faster.
    """
    spec = target.spec
    even = all(before == after for before, after in spec.padding)
    if fourier and even and spec.dims == 2 and spec.groups == 1 and spec.stride == spec.dilation == (1, 1):
        return convolve_by_frequencies(x, target.weight, target.bias, spec.padding[0][0], spec.padding[1][0])
    if not even:
        x = F.pad(x, _zeros(target))
    padding = [before if even else 0 for before, _ in spec.padding]
    convolution = _CONVOLUTIONS[spec.dims]
    return convolution(x, target.weight, target.bias, spec.stride, padding, spec.dilation, spec.groups)


def _zeros(target: Target) -> list[int]:
    """The padding as `torch.nn.functional.pad` takes it: the last axis first."""
    return [zeros for before, after in reversed(target.spec.padding) for zeros in (before, after)]


def pooled(x: Tensor, pool: Pool) -> Tensor:
    """The pooling of maps of as many axes as its windows have."""
    return (_MEANS if pool.average else _MAXIMA)[len(pool.kernel)](x, pool.kernel)


def _pooled_backward(grad: Tensor, x: Tensor, pool: Pool) -> Tensor:
    """The gradient of x [B, C, *size], from that of `pooled`."""
    dims, kernel = len(pool.kernel), list(pool.kernel)
    if dims == 1:  # torch has this in two and three dimensions
        of_rows = Pool((1, *pool.kernel), pool.average)
        return _pooled_backward(grad.unsqueeze(2), x.unsqueeze(2), of_rows).squeeze(2)
    one, zero = [1] * dims, [0] * dims
    if pool.average:
        return _MEANS_BACKWARD[dims](grad, x, kernel, kernel, zero, False, True, None)
    _, indices = _INDICES[dims](x, kernel, kernel, zero, one)
    return _MAXIMA_BACKWARD[dims](grad, x, kernel, kernel, zero, one, False, indices)


@dataclass(frozen=True)
class Masked:
    """One target layer on batches of `shape`: [B, C, *size] -> [B, O, *size'], and back from the gradient of that."""

    target: Target
    shape: tuple[int, ...]
    fourier: bool = False

    @property
    def targets(self) -> tuple[Target, ...]:
        """The layer."""
        return (self.target,)

    def room_shapes(self) -> list[tuple[int, ...]]:
        """Of what `forward` leaves for `backward`: the convolution's result before the window."""
        return [(self.shape[0], len(self.target.weight), *self.target.output_size(self.shape[2:]))]

    def forward(self, x: Tensor, room: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The layer's result, and what `backward` needs again, in `room` if that is given."""
        convolved = convolve(x, self.target, fourier=self.fourier)
        saved = [convolved] if room is None else [room[0].copy_(convolved)]
        weighed = convolved * self._window(convolved)
        rectified = F.relu(weighed) if self.target.spec.relu else weighed
        pool = self.target.spec.pool
        return rectified if pool is None else pooled(rectified, pool), saved

    def _window(self, convolved: Tensor) -> Tensor:
        return kept_window(self.target, tuple(convolved.shape[2:]), convolved.dtype)

    def backward(self, grad: Tensor, x: Tensor, saved: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of x, weight, bias, loc and scale, as far as `needs` says."""
        convolved = saved[0].to(x.dtype)
        target, spec = self.target, self.target.spec
        window = self._window(convolved)
        grad = self._before_pooling(grad, convolved * window)
        results: list[Tensor | None] = [None] * 5
        if needs[3] or needs[4]:
            per_pixel = grad * convolved
            in_window = per_pixel if target.per_image else sum_over_batch(per_pixel)
            if spec.clip:
                in_window = in_window * (window != 0)
            wide = torch.float64 if in_window.dtype == torch.float64 else torch.float32
            results[3:] = window_gradients(target, tuple(convolved.shape[2:]), in_window.to(wide))
        results[:3] = self._convolution_backward(grad * window, x, needs)
        return [result if needed else None for result, needed in zip(results, needs, strict=True)]

    def _before_pooling(self, grad: Tensor, weighed: Tensor) -> Tensor:
        """The gradient of what the window gave, from that after ReLU and pooling."""
        spec = self.target.spec
        rectified = F.relu(weighed) if spec.relu else weighed
        if spec.pool is not None:
            grad = _pooled_backward(grad, rectified, spec.pool)
        return _aten.threshold_backward(grad, rectified, 0) if spec.relu else grad

    def _convolution_backward(self, grad: Tensor, x: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        target, spec = self.target, self.target.spec
        even = all(before == after for before, after in spec.padding)
        padded = x if even else F.pad(x, _zeros(target))
        grads = _aten.convolution_backward(
            grad,
            padded,
            target.weight,
            None if target.bias is None else [len(target.weight)],
            spec.stride,
            [before if even else 0 for before, _ in spec.padding],
            spec.dilation,
            False,
            [0] * spec.dims,
            spec.groups,
            [needs[0], needs[1], needs[2] and target.bias is not None],
        )
        grad_x = grads[0]
        if grad_x is not None and not even:
            for axis, ((before, _), length) in enumerate(zip(spec.padding, x.shape[2:], strict=True)):
                grad_x = grad_x.narrow(2 + axis, before, length)
        return grad_x, grads[1], grads[2]
