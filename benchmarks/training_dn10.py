"""Training steps of TDN10 against DN10's, batch 128, bfloat16: python benchmarks/training_dn10.py OUT SIDE [SECONDS]

On images of SIDE 28 or 56; OUT is a file of JSON. TDN10 has the ROIs of trained networks (results/rois). Its layers are
computed inside their ROIs ("roi") or densely and then masked ("dense"), the networks compiled or not, some with
channels last; all take turns, medians in milliseconds. Nothing else should run meanwhile. A first run with SECONDS=0
leaves what torch.compile makes in its cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn

from tkn.app.memory import keep_freed_memory
from tkn.bench.engines import TimedEngine, TrainingOptions, prepare_training
from tkn.bench.machine import describe_machine
from tkn.bench.measure import Sampling, time_interleaved
from tkn.bench.networks import build_networks, images_and_labels
from tkn.plan.place import Place

BATCH, ROUNDS = 128, 5
ROIS = Path(__file__).resolve().parents[1] / "results" / "rois"
#: Side of the images, and where the ROIs come from.
SIZES = {28: "tdn10_mnist.json", 56: "tdn10_tlmnist.json"}
#: What is timed: the network, and how it takes a step.
STEPS = {
    "DN10, compiled": ("baseline", TrainingOptions(compiled=True)),
    "DN10, compiled, channels last": ("baseline", TrainingOptions(compiled=True, channels_last=True)),
    "TDN10, roi, compiled": ("targeted", TrainingOptions(compiled=True, target_engine="roi")),
    "TDN10, roi, compiled, channels last": (
        "targeted",
        TrainingOptions(compiled=True, channels_last=True, target_engine="roi"),
    ),
    "TDN10, dense, compiled": ("targeted", TrainingOptions(compiled=True)),
    "DN10": ("baseline", TrainingOptions()),
    "TDN10, roi": ("targeted", TrainingOptions(target_engine="roi")),
}


def main() -> None:
    keep_freed_memory()
    torch._dynamo.config.recompile_limit = 64  # else the last of so many networks of one class would not be compiled
    size = int(sys.argv[2])
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 5.0
    results = {"machine": describe_machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    results["ms"] = dict(timed(size, SIZES[size], seconds))
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def timed(size: int, rois: str, seconds: float) -> Iterator[tuple[str, object]]:
    """The figures of all steps on images of a size."""
    case = {"baseline": "dn10", "targeted": "tdn10", "input_size": [1, size, size], "num_outputs": 10}
    source = {"source": "file", "path": str(ROIS / rois)}
    config = OmegaConf.create({"seed": 0, "case": case, "rois": source, "thinned": {"multiple": 1}})
    networks: dict[str, nn.Module] = {network.kind: network.model for network in build_networks(config)}
    batch = images_and_labels(config, BATCH)
    place = Place(torch.device("cpu"), torch.bfloat16)
    calls = {
        name: prepare_training(TimedEngine(train=options), networks[kind], *batch, place).call
        for name, (kind, options) in STEPS.items()
    }
    timings, failures = time_interleaved(calls, Sampling(ROUNDS, 2 * ROUNDS, seconds, seconds / 10), 0)
    for failure in failures.values():
        raise failure
    for name, timing in timings.items():
        figures = {key: value if key == "n" else round(1e3 * value, 2) for key, value in asdict(timing).items()}
        print(f"{size}x{size} {name:36} {figures['median']:7.1f} ms", flush=True)
        yield name, figures


if __name__ == "__main__":
    main()
