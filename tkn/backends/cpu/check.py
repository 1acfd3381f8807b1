"""Compiles the kernels and holds them against torch: `python -m tkn.backends.cpu.check float32`, in a child process.

It ends with status 0 and a mark in the kernels' folder if they are right, else with a line that says what is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.app.messages import message
from tkn.backends.cpu import build, normed
from tkn.backends.cpu.backend import chain
from tkn.backends.cpu.factors import keep_factors
from tkn.geometry import Pool
from tkn.spec import Target, TargetSpec
from tkn.windows import target_window

_TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-10}
_SIZE: tuple[int, ...] = (9, 8)


def check_kernels(dtype: torch.dtype) -> None:
    """EngineUnavailable if a result or a gradient of the kernels is not torch's."""
    torch.manual_seed(0)
    for batch, channels, pool in ((3, 5, None), (37, 20, Pool((2, 2)))):
        _check(dtype, dtype, batch, (channels, 13), pool)
    if dtype == torch.float32:
        # Enough channels for pairs, also backward.
        _check(dtype, torch.bfloat16, 37, (41, 21), None)
        if build.kernels(dtype).tkn_bfloat16():
            _check_normed()


def _check(dtype: torch.dtype, result: torch.dtype, batch: int, channels: tuple[int, int], pool: Pool | None) -> None:
    inputs, outputs = channels
    # Numbers that need no rounding, so that the same of them are positive.
    x = torch.randn(batch, inputs, *_SIZE).to(result).to(dtype)
    layers = [_layer(inputs, outputs, dtype, pool)]
    if result == dtype:
        layers.append(_layer(outputs, 6, dtype, None))
    run = chain(tuple(x.shape), dtype, layers, result)
    ours, saved = run.forward(x)
    tensors = [x, *(tensor for layer in layers for tensor in layer.tensors)]
    followed = [t.detach().clone().requires_grad_() for t in tensors]
    theirs, size = followed[0], _SIZE
    for position, layer in enumerate(layers):
        copied = Target(layer.spec, *followed[1 + 4 * position : 5 + 4 * position])
        theirs = _reference(theirs, copied, size)
        size = layer.result_size(size)
    up = torch.randn(theirs.shape).to(result)
    expected = torch.autograd.grad(theirs, followed, up.to(dtype))
    found = run.backward(up, x, saved, [True] * len(tensors))
    _compare(result, [ours, *(grad for grad in found if grad is not None)], [theirs, *expected])


def _check_normed() -> None:
    """The kernels of a normalisation, a ReLU and a target convolution in one."""
    x = torch.randn(3, 5, *_SIZE).bfloat16()
    layer = _layer(5, 3, torch.float32, None)
    target = Target(replace(layer.spec, relu=False), layer.weight, None, layer.loc, layer.scale)
    norm = 1 + torch.rand(5), torch.randn(5)
    y, *statistics = normed.forward(x, *norm, 1e-5, target)
    up = torch.randn(y.shape).bfloat16()
    found = normed.backward(up, y, x, (statistics[0], statistics[1]), *norm, 1e-5, target)
    followed = [t.detach().double().requires_grad_() for t in (x, *norm, *target.tensors)]
    rectified = F.relu(F.batch_norm(followed[0], None, None, followed[1], followed[2], training=True))
    window = target_window(Target(target.spec, followed[3], None, *followed[4:]), _SIZE)
    theirs = F.conv2d(rectified, followed[3], padding=1) * window
    expected = torch.autograd.grad(theirs, followed, up.double())
    _compare(torch.bfloat16, [y, *found], [theirs, *expected])


def _layer(inputs: int, outputs: int, dtype: torch.dtype, pool: Pool | None) -> Target:
    spec = TargetSpec("cauchy", 0.5, True, (1, 1), ((1, 1), (1, 1)), (1, 1), 1, True, pool)
    weight = torch.randn(outputs, inputs, 3, 3).bfloat16().to(dtype)
    loc, scale = 0.2 + 0.6 * torch.rand(2, outputs, dtype=dtype), 0.2 + 0.4 * torch.rand(2, outputs, dtype=dtype)
    return Target(spec, weight, torch.randn(outputs, dtype=dtype), loc, scale)


def _reference(x: Tensor, layer: Target, size: tuple[int, ...]) -> Tensor:
    y = F.relu(F.conv2d(x, layer.weight, layer.bias, padding=1) * target_window(layer, size))
    return y if layer.spec.pool is None else F.max_pool2d(y, layer.spec.pool.kernel)


def _compare(kind: torch.dtype, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        error = float((one.double() - other.double()).detach().abs().max() / other.detach().abs().max())
        if not error <= _TOLERANCE[kind]:  # also NaN
            raise build.EngineUnavailable(
                f"the compiled kernels for {kind} compute wrongly (relative error {error:.1e})"
            )


def main() -> None:
    """Compile, check, mark."""
    dtype = getattr(torch, sys.argv[1])
    try:
        try:
            build.use(dtype, build.compile_kernels(dtype))
        except Exception as error:  # no compiler, no ninja, an unknown CPU
            raise build.EngineUnavailable(f"the kernels could not be compiled: {message(error)[:300]}") from error
        check_kernels(dtype)
    except build.EngineUnavailable as error:
        sys.exit(str(error))
    if dtype == torch.float32:
        # Not kept where the machine is busy: then the cost model's own constants hold.
        keep_factors()
    build.checked_mark(dtype).touch()


if __name__ == "__main__":
    main()
