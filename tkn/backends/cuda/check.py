"""Whether the kernels compute what torch computes: asked once for each type of numbers, before their first use."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.backends.cuda.chain import Chain
from tkn.backends.cuda.rows import full_rows
from tkn.backends.cuda.stage import Stage
from tkn.geometry import Pool
from tkn.roi import roi_bounds
from tkn.spec import Target, TargetSpec
from tkn.windows import target_window

_BATCH, _CHANNELS, _SIZE = 20, (5, 70, 9), (9, 8)
#: What rounding may cost, as a part of the norm.
_TOLERANCE = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def wrong_results(device: torch.device, dtype: torch.dtype) -> str | None:
    """How two layers' results or gradients differ from torch's in float64; None if they are as near as they may be."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device="cpu").to(device)

    pooled = Pool((2, 2))
    targets = []
    for inputs, outputs, pool in ((*_CHANNELS[:2], pooled), (*_CHANNELS[1:], None)):
        spec = TargetSpec("cauchy", 0.5, True, (1, 1), ((1, 1), (1, 1)), (1, 1), 1, relu=True, pool=pool)
        weight = (random(outputs, inputs, 3, 3) - 0.4) / sqrt(inputs)
        tensors = weight.to(dtype), (random(outputs) - 0.5).to(dtype), random(2, outputs), 0.3 + random(2, outputs) / 2
        targets.append(Target(spec, *tensors))
    x = random(_BATCH, _CHANNELS[0], *_SIZE).to(dtype)
    chain = _chain(targets, tuple(x.shape), dtype)
    y, saved = chain.forward(x)
    grad = random(*y.shape).to(dtype)
    found = [y, *chain.backward(grad, x, saved, [True] * 9)]
    for name, mine, expected in zip(("results", *["gradients"] * 9), found, _expected(x, targets, grad), strict=True):
        assert mine is not None
        # Not the largest: rounding lets another of two nearly equal numbers be the maximum of a pooling.
        error = float((mine.double() - expected).norm() / expected.norm())
        if not error <= _TOLERANCE[dtype]:
            return f"{name} in {dtype} differ from torch's by {error:.2g} of their norm"
    return None


def _chain(targets: list[Target], shape: tuple[int, ...], dtype: torch.dtype) -> Chain:
    source, size = full_rows(shape[1], _SIZE, targets[0].weight.device), _SIZE
    stages = []
    for target in targets:
        geometry = target.spec.geometry(size, target.kernel)
        rois = roi_bounds(geometry.output_size, target.loc, target.scale)
        stages.append(Stage(source, rois, geometry, 1, target.spec.relu, target.spec.pool))
        source = stages[-1].output
        size = source.size
    return Chain(tuple(targets), tuple(stages), shape[0], dtype, channels_last=False)


def _expected(x: Tensor, targets: list[Target], grad: Tensor) -> list[Tensor]:
    """The result and the gradients of x and of each layer's tensors."""
    x = x.double().requires_grad_()
    leaves, y = [x], x
    for target in targets:
        weight, bias, loc, scale = (t.double().requires_grad_() for t in target.tensors)
        leaves += [weight, bias, loc, scale]
        y = F.conv2d(y, weight, bias, padding=1)
        y = F.relu(y * target_window(Target(target.spec, weight, bias, loc, scale), tuple(y.shape[2:])))
        y = y if target.spec.pool is None else F.max_pool2d(y, 2)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]
