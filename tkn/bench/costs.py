"""Fits the constants of the cost model: `python -m tkn.bench.costs sample FILE COUNT`, then `... fit FILE...`.

`sample` times random layers by both engines and appends a line of JSON for each; nothing else should run meanwhile.
`fit` writes tkn/costs.json and says how often the estimate chooses an engine that is more than 15 % slower.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from tkn import costs
from tkn.app.files import write_whole
from tkn.backends.torch.fourier import use_fourier
from tkn.bench.alone import alone
from tkn.geometry import Pool
from tkn.layers import TargetConv2d
from tkn.ops.segments import Call, work_of
from tkn.sequential import TargetSequential
from tkn.work import Work

#: Multiply-adds of a dense batch that are worth sampling.
_WORTH = (2e5, 4e9)


def random_layer(random: Random) -> tuple[TargetSequential, Tensor, Work, bool] | None:
    """A layer with ReLU and perhaps pooling, its input, what it is, whether under autocast; None if not worth it."""
    inputs = random.choice([1, 3, 8, 12, 16, 24, 36, 48, 64, 96, 128, 192, 256])
    outputs = random.choice([8, 12, 16, 24, 32, 36, 64, 128, 192, 256])
    kernel, stride = random.choice([1, 3, 3, 3, 5, 5, 7]), random.choice([1, 1, 1, 2])
    size, batch = random.choice([4, 7, 8, 14, 16, 28, 32, 56]), random.choice([1, 2, 4, 8, 16, 32, 64, 128])
    grouped = inputs % 4 == 0 and outputs % 4 == 0 and random.random() < 0.2
    pooled, training, last = random.random() < 0.35, random.random() < 0.5, random.random() < 0.3
    half, needs_x = random.random() < 0.3, random.random() < 0.8
    fourier = training and random.random() < 0.4
    share = random.choice([0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0])
    side = size // stride
    layer = TargetConv2d(inputs, outputs, kernel, stride, kernel // 2, groups=4 if grouped else 1, bias=False)
    pool = Pool((2, 2)) if pooled and side >= 4 else None
    with torch.no_grad():
        spread = 0.7 + 0.6 * torch.rand(2, outputs)
        layer.scale.copy_((sqrt(share / 2) * spread).clamp(1.5 / (sqrt(2) * max(2, side)), 1))
        layer.loc.copy_(torch.rand(2, outputs) * (1 - sqrt(share)) + sqrt(share) / 2)
    x = torch.randn(batch, inputs, size, size)
    if last:
        layer = layer.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    if fourier:
        use_fourier(layer)
    x.requires_grad_(training and needs_x)
    call = Call(torch.bfloat16 if half else torch.float32, half, training, x.requires_grad, True)
    target = layer.target(relu=True, pool=pool)
    work = work_of(tuple(x.shape), target, 1.0, call, needs_x=call.needs_x, fourier=fourier)
    if not _WORTH[0] < work.macs < _WORTH[1]:
        return None
    return TargetSequential(layer, nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])), x, work, half


def sample(path: Path, count: int, seed: int) -> None:
    """Append the times of `count` random layers to `path`."""
    random = Random(seed)
    torch.manual_seed(seed)
    made = 0
    while made < count:
        drawn = random_layer(random)
        if drawn is None:
            continue
        network, x, work, half = drawn
        row: dict[str, Any] = {"work": {**asdict(work), "dtype": str(work.dtype).removeprefix("torch.")}}
        for engine in ("roi", "dense"):
            network[0].engine = engine  # type: ignore[assignment]
            row[engine] = least(step(network, x, work.training, half))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        made += 1


def step(network: nn.Module, x: Tensor, training: bool, half: bool) -> Callable[[], None]:
    """A forward pass, in training with the gradients."""
    wanted = [t for t in (x, *network.parameters()) if t.requires_grad]

    def run() -> None:
        with torch.set_grad_enabled(training):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = network(x)
            if training:
                torch.autograd.grad(y, wanted, torch.ones_like(y))

    return run


def least(run: Callable[[], None], budget: float = 0.25) -> float:
    """The least seconds of a few calls, within a budget of seconds."""
    run()
    taken: list[float] = []
    started = time.perf_counter()
    while len(taken) < 3 or (time.perf_counter() - started < budget and len(taken) < 30):
        before = time.perf_counter()
        run()
        taken.append(time.perf_counter() - before)
    return min(taken)


def read(paths: list[Path]) -> list[tuple[Work, dict[str, float]]]:
    """What `sample` wrote."""
    rows = []
    for line in (line for path in paths for line in path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in row.pop("work").items()
        }
        rows.append((Work(**{**values, "dtype": getattr(torch, values["dtype"])}), row))
    return rows


def fitted(counts: np.ndarray, seconds: np.ndarray) -> list[float]:
    """Constants, none negative, whose sums are near the seconds as parts of these."""
    largest = np.maximum(counts.max(axis=0), 1e-30)
    scaled, weight = counts / largest, 1 / seconds
    for _ in range(8):  # towards equal errors of the logarithms
        found, _ = nnls(scaled * weight[:, None], seconds * weight)
        estimate = np.maximum(scaled @ found, 1e-9)
        weight = 1 / np.sqrt(seconds * estimate * (1 + np.abs(np.log(estimate / seconds))))
    return [float(f"{constant:.3g}") for constant in found / largest]


def fit(paths: list[Path]) -> dict[str, dict[str, list[float]]]:
    """The constants by engine and kind; prints what choosing by them loses."""
    made: dict[str, dict[str, list[float]]] = {"dense": {}, "roi": {}}
    rows = read(paths)
    for kind in sorted({costs.kind_of(work) for work, _ in rows}):
        own = [(work, row) for work, row in rows if costs.kind_of(work) == kind]
        times, estimates = {}, {}
        for engine, count in (("dense", costs.dense_counts), ("roi", costs.roi_counts)):
            counts = np.array([count(work) for work, _ in own], dtype=float)
            times[engine] = np.array([row[engine] for _, row in own])
            made[engine][kind] = fitted(counts, times[engine])
            estimates[engine] = counts @ np.array(made[engine][kind])
        chosen = np.where(estimates["roi"] < estimates["dense"], times["roi"], times["dense"])
        loss = chosen / np.minimum(times["roi"], times["dense"])
        average, often = loss.mean() - 1, (loss > 1.15).mean()
        print(f"{kind}: {len(own)} layers, loss {average:.1%} on average, above 15 % in {often:.1%}")
    return made


def main() -> None:
    """As the module says."""
    action, *rest = sys.argv[1:] or [""]
    if action == "sample" and len(rest) in (2, 3):
        with alone():
            sample(Path(rest[0]), int(rest[1]), int(rest[2]) if len(rest) > 2 else 0)
    elif action == "fit" and rest:
        found, known = fit([Path(path) for path in rest]), costs.constants()
        # Kinds without a sample keep what they had.
        merged = {engine: {**known[engine], **kinds} for engine, kinds in found.items()}
        write_whole(Path(costs.__file__).with_name("costs.json"), json.dumps(merged) + "\n")
    else:
        sys.exit("usage: python -m tkn.bench.costs sample FILE COUNT [SEED] | fit FILE...")


if __name__ == "__main__":
    main()
