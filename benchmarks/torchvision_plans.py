"""Plans of torchvision's networks against torch and OpenVINO: python benchmarks/torchvision_plans.py OUT.json

Each network has random weights and, in every convolution larger than 1x1, random ROIs of a third of the map, placed
anywhere. In turns, in one process: eager torch in both memory formats with the target layers dense, and the plan; with
the first ROIs also the network without ROIs by eager torch, by OpenVINO in float32 and as a plan; with `--compile`
torch.compile too, which takes a minute for each. At 64x64 with 16 images, and at 224x224 with one. Leave the machine
alone meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
import torchvision
from torch import nn

import tkn
from tkn.bench.engines import TIMED_ENGINES, prepare_inference
from tkn.bench.machine import describe_machine, load_average
from tkn.layers import roi_layers
from tkn.plan.compare import difference

NETWORKS = (
    *("resnet18", "resnext50_32x4d", "densenet121", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small"),
    *("efficientnet_b0", "mnasnet1_0", "regnet_y_400mf", "shufflenet_v2_x1_0", "squeezenet1_1", "googlenet"),
    "convnext_tiny",
)
SIZES = ((64, 16), (224, 1))
TURNS, CALLS = 7, 3
SHARE = 1 / 3


def dense(name: str, seed: int) -> nn.Module:
    """The network in evaluation mode."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not initialised as they will be
        model: nn.Module = torchvision.models.get_model(name, num_classes=10, **options)
    return model.eval()


def targeted(name: str, seed: int) -> nn.Module:
    """The same network with its ROIs."""
    model = tkn.targetize(dense(name, seed), attention="cauchy", inplace=True)
    with torch.no_grad():
        for layer in roi_layers(model).values():
            layer.scale.fill_(SHARE**0.5)
            layer.loc.uniform_(0, 1)
            layer.engine = "dense"
    return model


def seconds(run: Callable[[], object]) -> float:
    """Of a call, the least of some in a row."""
    taken = []
    for _ in range(CALLS):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return min(taken)


@torch.inference_mode()
def row(name: str, side: int, batch: int, seed: int, *, compiles: bool) -> dict[str, Any]:
    """Medians in milliseconds."""
    model = targeted(name, seed)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = torch.rand(batch, 3, side, side)
    x_last = x.contiguous(memory_format=torch.channels_last)
    started = time.perf_counter()
    plan = tkn.accelerate(model, batch, (3, side, side))
    made = time.perf_counter() - started
    runs: dict[str, Callable[[], object]] = {
        "eager": lambda: model(x),
        "channels_last": lambda: last(x_last),
        "plan": lambda: plan(x),
    }
    if seed == 0:
        runs |= without_rois(name, x)
    if compiles:
        compiled = torch.compile(copy.deepcopy(model), dynamic=False)
        runs["compiled"] = lambda: compiled(x)
    taken: dict[str, list[float]] = {kind: [] for kind in runs}
    for run in runs.values():
        run()
    for _ in range(TURNS):
        for kind, run in runs.items():
            taken[kind].append(seconds(run))
    ms = {kind: round(1e3 * median(values), 3) for kind, values in taken.items()}
    return {
        "network": name,
        "size": side,
        "batch": batch,
        "seed": seed,
        "ms": ms,
        "faster": round(min(ms["eager"], ms["channels_last"]) / ms["plan"], 3),
        "way": next(iter(plan.timings), ""),
        "left_to_torch": len(plan.fallbacks),
        "difference": difference(plan(x), model(x)),
        "made_seconds": round(made, 2),
    }


def without_rois(name: str, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What computes the network as it was."""
    plain = dense(name, 0)
    plan = tkn.accelerate(plain, len(x), tuple(x.shape[1:]))
    return {
        "dense_eager": lambda: plain(x),
        "dense_openvino": prepare_inference(TIMED_ENGINES["openvino"], plain, x, torch.get_num_threads()).call,
        "dense_plan": lambda: plan(x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="sets of ROIs")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--compile", action="store_true", help="with the first ROIs")
    given = parser.parse_args()
    tkn.accelerate(nn.Conv2d(1, 1, 1), 1, (1, 1, 1))  # compiles the kernels, if they are not there yet
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "rows": [],
    }
    for side, batch in SIZES:
        for name in given.networks:
            for seed in range(given.seeds):
                result["rows"].append(row(name, side, batch, seed, compiles=given.compile and seed == 0))
                print(json.dumps(result["rows"][-1]), flush=True)
                result["geometric_mean"] = round(geometric_mean(one["faster"] for one in result["rows"]), 3)
                given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
