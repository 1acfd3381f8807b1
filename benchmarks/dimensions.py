"""Training steps of layers of one and three dimensions in ROIs of a quarter: python benchmarks/dimensions.py

A step is the layer with a ReLU, forward and backward, the gradient of its input too. The plain convolution by eager
torch, the target layer dense and then masked, inside its ROIs, and by "auto" take turns; medians in milliseconds.
Nothing else should run meanwhile.
"""

from __future__ import annotations

import time
from math import sqrt
from statistics import median
from typing import Any

import torch
from torch import nn

import tkn
from tkn.bench.costs import step
from tkn.sequential import TargetSequential

SHARE, ROUNDS, WARMUP = 0.25, 9, 2
#: Channels in and out, pixels of the kernel, size of the map, batch.
LAYERS: list[tuple[int, int, tuple[int, ...], tuple[int, ...], int]] = [
    (40, 64, (9,), (101,), 128),
    (64, 64, (9,), (400,), 64),
    (128, 128, (3,), (500,), 32),
    (128, 128, (9,), (250,), 32),
    (256, 256, (3,), (125,), 64),
    (16, 32, (3, 3, 3), (8, 28, 28), 32),
    (32, 32, (3, 3, 3), (8, 28, 28), 32),
    (64, 64, (3, 3, 3), (8, 14, 14), 32),
    (64, 64, (3, 3, 3), (4, 14, 14), 64),
    (128, 128, (3, 3, 3), (4, 7, 7), 64),
]
CLASSES: dict[int, tuple[Any, Any]] = {1: (nn.Conv1d, tkn.TargetConv1d), 3: (nn.Conv3d, tkn.TargetConv3d)}


def main() -> None:
    for inputs, outputs, kernel, size, batch in LAYERS:
        torch.manual_seed(0)
        dims = len(kernel)
        plain, targeted = CLASSES[dims]
        side = SHARE ** (1 / dims)
        geometry: dict[str, Any] = {"padding": tuple(k // 2 for k in kernel)}
        networks: dict[str, nn.Module] = {"eager": nn.Sequential(plain(inputs, outputs, kernel, **geometry), nn.ReLU())}
        place = side / 2 + (1 - side) * torch.rand(dims, outputs)
        for engine in ("dense", "roi", "auto"):
            layer = targeted(inputs, outputs, kernel, **geometry, engine=engine)
            with torch.no_grad():
                layer.loc.copy_(place)
                layer.scale.fill_(side / sqrt(2))
            networks[engine] = TargetSequential(layer, nn.ReLU())
        x = torch.randn(batch, inputs, *size, requires_grad=True)
        steps = {name: step(network, x, True, False) for name, network in networks.items()}
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(WARMUP + ROUNDS):
            for name, run in steps.items():
                started = time.perf_counter()
                run()
                if turn >= WARMUP:
                    taken[name].append(1e3 * (time.perf_counter() - started))
        figures = "  ".join(f"{name} {median(times):7.2f}" for name, times in taken.items())
        print(
            f"{inputs:3}->{outputs:3} {'x'.join(map(str, kernel)):5} {size!s:12} batch {batch:3}: {figures}", flush=True
        )


if __name__ == "__main__":
    main()
