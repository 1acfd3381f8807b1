"""Freshly compiled kernels against torch, before their first use."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tkn.backends.cpu.build import EngineUnavailable
from tkn.backends.cpu.stage import Activation, Stage
from tkn.geometry import Geometry, Pool
from tkn.layers import TargetConv2d
from tkn.plan.capture import build_graph, frozen
from tkn.plan.plan import Plan
from tkn.sequential import TargetSequential

_TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-10}


def check_kernels(dtype: torch.dtype) -> None:
    """EngineUnavailable if a result or a gradient of the kernels is not torch's."""
    # Whatever the caller is about: inference, autocast, other defaults.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(0)
        for batch, channels, pool in ((3, 5, None), (37, 20, Pool((2, 2)))):
            _check_stage(dtype, batch, channels, pool)
        if dtype == torch.float32:
            _check_stage(dtype, 37, 41, None, bfloat16=True)
            _check_plans()


def _check_stage(dtype: torch.dtype, batch: int, channels: int, pool: Pool | None, *, bfloat16: bool = False) -> None:
    geometry = Geometry((9, 8), (3, 3), before=(1, 1), after=(1, 1))
    outputs = 21 if bfloat16 else 13  # enough for pairs backward too
    mask = torch.zeros(outputs, 9, 8, dtype=torch.bool)
    for channel in range(len(mask)):
        mask[channel, channel % 5 : channel % 5 + 3, channel % 4 : channel % 4 + 4] = True
    x = torch.randn(batch, channels, 9, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(outputs, channels, 3, 3, dtype=dtype, requires_grad=True)
    window = torch.rand(outputs, 9, 8, dtype=dtype, requires_grad=True)
    kind = torch.bfloat16 if bfloat16 else dtype
    # Numbers that need no rounding, so that the same of them are positive.
    x, weight = (t.detach().to(kind).to(dtype).requires_grad_() for t in (x, weight))
    packed = Activation.pack(x.to(kind), dtype)
    stage = Stage(packed.rows, mask.numpy(), geometry, 1, True, pool, packed.tiles, dtype, bfloat16)
    ours = stage(packed, weight, None, window).unpack(dtype=kind)
    theirs = F.relu(F.conv2d(x, weight, padding=1) * window * mask)
    if pool is not None:
        theirs = F.max_pool2d(theirs, pool.kernel)
    up = torch.randn_like(theirs)
    inputs = (x, weight, window)
    _compare(
        kind,
        [ours, *torch.autograd.grad((ours * up).sum(), inputs)],
        [theirs, *torch.autograd.grad((theirs * up).sum(), inputs)],
    )


def _check_plans() -> None:
    model = TargetSequential(
        TargetConv2d(1, 20, 5, padding=2, engine="dense"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        TargetConv2d(20, 18, 3, padding=1, engine="dense"),
        nn.BatchNorm2d(18),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(18 * 9, 7),
    )
    for module in model:
        if isinstance(module, TargetConv2d):
            nn.init.uniform_(module.scale, 0.2, 0.8)
            nn.init.uniform_(module.loc, 0.2, 0.8)
    model = model.float()
    graph = build_graph(frozen(model), (1, 12, 12))
    x = torch.rand(5, 1, 12, 12, dtype=torch.float32)
    with torch.no_grad():
        expected = model.eval()(x)
    for small in (True, False):
        _compare(torch.float32, [Plan(graph, len(x), small=small)(x)], [expected])


def _compare(dtype: torch.dtype, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        error = float((one - other).detach().abs().max() / other.detach().abs().max())
        if not np.isfinite(error) or error > _TOLERANCE[dtype]:
            raise EngineUnavailable(f"the compiled kernels for {dtype} compute wrongly (relative error {error:.1e})")
