"""A training step of resnet18 at a third of its multiply-adds: python benchmarks/training_resnet.py OUT.json

In turns, in one process, medians: the dense network, the one thinned to as many multiply-adds, and the targeted one
with random ROIs, as `engine="auto"` computes it and by masks alone. 128x128 pixels, 16 images, float32, channels-last.
Leave the machine alone meanwhile.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
import torchvision
from torch import nn

import tkn
from tkn.bench.machine import describe_machine, load_average
from tkn.bench.rois import generate_rois
from tkn.layers import roi_layers
from tkn.models.thin import thin

SIZE, BATCH, SHARE, TURNS = (3, 128, 128), 16, 1 / 3, 9


def targeted(engine: str) -> nn.Module:
    """With ROIs that leave a third."""
    torch.manual_seed(0)
    model = tkn.targetize(torchvision.models.resnet18(num_classes=10), attention="cauchy")
    generate_rois(model, SIZE, SHARE, seed=0)
    for layer in roi_layers(model).values():
        layer.engine = engine
    return model


def step(model: nn.Module) -> Callable[[], None]:
    """zero_grad, forward, backward, SGD; of targeted networks the projection too. The rate moves no ROI."""
    model.train().to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, *SIZE).to(memory_format=torch.channels_last)
    labels = torch.arange(BATCH) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12, momentum=0.9, nesterov=True)

    def run() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        if roi_layers(model):
            loss = loss + tkn.scale_penalty(model, l2=1e-4)
        loss.backward()
        optimizer.step()
        tkn.project_(model)

    return run


def main() -> None:
    dense = torchvision.models.resnet18(num_classes=10)
    networks = {"dense": dense, "targeted, auto": targeted("auto"), "targeted, masks": targeted("dense")}
    macs = tkn.count_macs(networks["targeted, auto"], SIZE).total_roi
    networks["thin"] = thin(dense, SIZE, macs)
    counts = {name: tkn.count_macs(model, SIZE).total_roi for name, model in networks.items()}
    start = load_average()
    steps = {name: step(model) for name, model in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS):
        for name, run in steps.items():
            started = time.perf_counter()
            run()
            if turn > 1:  # the first ones warm up
                times[name].append(1000 * (time.perf_counter() - started))
    rows = [
        {"network": name, "macs": counts[name], "ms": round(median(taken), 1), "quartiles": quantiles(taken, n=4)[::2]}
        for name, taken in times.items()
    ]
    about = {"machine": describe_machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    result = {**about, "load_average": start, "size": SIZE, "batch": BATCH, "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
