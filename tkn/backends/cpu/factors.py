"""How fast this machine is beside that of the cost model's constants: measured once, when its kernels are compiled."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import exp, log
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.app.files import write_whole
from tkn.backends.cpu import build
from tkn.backends.cpu.backend import chain
from tkn.costs import kind_of, seconds
from tkn.load import OtherLoad
from tkn.spec import Target, TargetSpec
from tkn.windows import kept_bounds, target_window
from tkn.work import Work

#: (batch, channels, outputs, size, kernel, scale of the ROIs)
_LAYERS = ((16, 32, 32, 28, 3, 0.4), (64, 16, 48, 14, 5, 0.3), (4, 64, 64, 16, 3, 0.5))
_ROUNDS = 7
#: Above this spread of a layer's times the machine was busy, and nothing is kept.
_MOST_SPREAD = 0.1
#: CPUs that others may keep busy meanwhile, for the same reason.
_MOST_LOAD = 0.1


def keep_factors() -> bool:
    """Measure and keep the factors; whether the machine was quiet enough for that. It takes about a second."""
    logs: dict[str, dict[str, list[float]]] = {"dense": {}, "roi": {}}
    spreads, load = [], OtherLoad()
    for work, engine, run in _runs():
        run()
        with load:
            times = [_taken(run) for _ in range(_ROUNDS)]
        spreads.append(median(times) / min(times) - 1)
        of_kind = logs[engine].setdefault(kind_of(work), [])
        of_kind.append(log(min(times) / seconds(engine, work, {})))
    if median(spreads) > _MOST_SPREAD or (load.mean() or 0) > _MOST_LOAD:
        return False
    factors = {
        engine: {kind: exp(sum(found) / len(found)) for kind, found in kinds.items()} for engine, kinds in logs.items()
    }
    for kinds in factors.values():
        kinds |= {f"{kind} fourier": factor for kind, factor in kinds.items()}
    build.factors_file().parent.mkdir(parents=True, exist_ok=True)
    write_whole(build.factors_file(), json.dumps(factors, indent=1))
    return True


def _taken(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _runs() -> Iterator[tuple[Work, str, Callable[[], object]]]:
    """Layers by both engines, forward and with gradients, in single and half precision."""
    for batch, inputs, outputs, size, kernel, scale in _LAYERS:
        spec = TargetSpec("cauchy", 0.5, True, (1, 1), ((kernel // 2,) * 2,) * 2, (1, 1), 1, True)
        weight = torch.randn(outputs, inputs, kernel, kernel)
        target = Target(spec, weight, None, torch.full((2, outputs), 0.5), torch.full((2, outputs), scale))
        x = torch.randn(batch, inputs, size, size)
        bounds = kept_bounds(target, (size, size))
        assert bounds is not None
        for dtype in (torch.float32, torch.bfloat16):
            for training in (False, True):
                work = Work(
                    batch=batch,
                    channels=inputs,
                    outputs=outputs,
                    groups=1,
                    size=(size, size),
                    output=(size, size),
                    kernel=(kernel, kernel),
                    stride=(1, 1),
                    dilation=(1, 1),
                    dtype=dtype,
                    share=bounds.area / (outputs * size * size),
                    live=1.0,
                    relu=True,
                    pool=None,
                    training=training,
                    needs_x=training,
                    channels_last=False,
                    fourier=False,
                    threads=torch.get_num_threads(),
                )
                yield work, "roi", partial(_in_rois, target, x, dtype, training)
                yield work, "dense", partial(_dense, target, x, dtype, training)


def _in_rois(target: Target, x: Tensor, dtype: torch.dtype, training: bool) -> None:
    run = chain(tuple(x.shape), x.dtype, (target,), dtype)
    y, saved = run.forward(x)
    if training:
        run.backward(y, x, saved, [True] * 5)


def _dense(target: Target, x: Tensor, dtype: torch.dtype, training: bool) -> None:
    x, weight = (t.detach().requires_grad_(training) for t in (x, target.weight))
    window = target_window(target, tuple(x.shape[2:]))
    padding = target.spec.padding[0][0]
    with torch.set_grad_enabled(training):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = F.conv2d(x, weight, padding=padding)
            y = F.relu(y * window.to(y.dtype))
        if training:
            torch.autograd.grad(y, (x, weight), y.detach())
            torch.mul(y, y).sum(0)  # the window's gradient
