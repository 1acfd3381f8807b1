"""Checks and times the ROI engine on a GPU: python benchmarks/gpu.py OUT.json [--dry]

TKN6 with trained ROIs (results/rois/) against CNN6 and a CNN6 of as many multiply-adds, dense, in channels-last format,
eager and compiled; each as one CUDA graph, timed by the GPU's events, in turns, twice. First the kernels are held
against torch. OUT.json is written after every row. `--dry`: a small network by Triton's interpreter on the CPU, timed
by nothing, to try this program where there is no GPU.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import tkn  # noqa: E402
from tkn.backends.cuda import backend  # noqa: E402
from tkn.backends.cuda.check import wrong_results  # noqa: E402
from tkn.bench.on_gpu import gpu_seconds, graphed  # noqa: E402
from tkn.layers import roi_layers  # noqa: E402
from tkn.macs import count_macs  # noqa: E402
from tkn.models.thin import thin  # noqa: E402
from tkn.ops import engines, sticky  # noqa: E402
from tkn.plan import place  # noqa: E402
from tkn.plan.compare import difference  # noqa: E402
from tkn.sequential import TargetSequential  # noqa: E402

DEVICE = torch.device("cpu" if DRY else "cuda")
ROOT = Path(__file__).resolve().parents[1]
CASES = {"tiny": (1, 8, 8)} if DRY else {"tkn6_mnist": (1, 28, 28), "tkn6_tlmnist": (1, 56, 56)}
INFERENCE = (2,) if DRY else (128, 512, 2048)
TRAINING = (2,) if DRY else (128, 512)
Run = Callable[[], object]


def networks(case: str, size: tuple[int, int, int]) -> dict[str, nn.Module]:
    """The dense network, the thin one and the targeted one."""
    torch.manual_seed(0)
    if case == "tiny":
        layers = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU())
        dense = nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(48, 10))
        targeted = nn.Sequential(TargetSequential(*tkn.targetize(dense[0])), *copy.deepcopy(dense[1:]))
        with torch.no_grad():
            for layer in roi_layers(targeted).values():
                layer.engine = "roi"
                layer.scale.fill_(0.4)
    else:
        dense = tkn.build_model("cnn6", size, 10)
        targeted = tkn.build_model("tkn6", size, 10, engine="roi")
        known = json.loads((ROOT / "results" / "rois" / f"{case}.json").read_text(encoding="utf-8"))["layers"]
        with torch.no_grad():
            for name, layer in roi_layers(targeted).items():
                layer.loc.copy_(torch.tensor(known[name]["loc"]))
                layer.scale.copy_(torch.tensor(known[name]["scale"]))
    return {"dense": dense, "thin": thin(dense, size, count_macs(targeted, size).total_roi), "tkn": targeted}


def captured(run: Run) -> Run:
    """The kernels of a call as one graph."""
    if DRY:
        return run
    return graphed(run)


def seconds(run: Run) -> float:
    """The median of some samples."""
    if DRY:
        run()
        return 0.0
    gpu_seconds(run)
    return median(gpu_seconds(run) for _ in range(9))


def prepared(model: nn.Module, dtype: torch.dtype, kind: str, training: bool) -> nn.Module:
    """A copy on the device, as it is timed."""
    model = copy.deepcopy(model).to(DEVICE)
    if not training:
        model = model.to(dtype).eval().requires_grad_(False)
    if kind != "tkn":
        model = model.to(memory_format=torch.channels_last)
    return model


def call(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype, training: bool) -> Run:
    """A forward pass in `dtype`, or forward and backward under autocast."""
    labels = torch.arange(len(x), device=DEVICE) % 10
    mixed = torch.autocast(DEVICE.type, dtype) if dtype != torch.float32 else nullcontext()

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with mixed:
            loss = F.cross_entropy(forward(x).float(), labels)
        loss.backward()

    def infer() -> None:
        with torch.no_grad():
            forward(x)

    return step if training else infer


def errors(case: str, size: tuple[int, int, int], models: dict[str, nn.Module]) -> dict[str, float]:
    """How far results and gradients in float32 are from those by torch in float64, by this engine and by torch."""
    x = torch.rand(4 if DRY else 64, *size, device=DEVICE)
    found = {}

    def results(engine: str, dtype: torch.dtype) -> list[Tensor]:
        model = copy.deepcopy(models["tkn"]).to(DEVICE, dtype).eval()  # dropout would differ
        for layer in roi_layers(model).values():
            layer.engine = engine  # type: ignore[assignment]
        loss = F.cross_entropy(model(x.to(dtype)), torch.arange(len(x), device=DEVICE) % 10)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    expected = results("dense", torch.float64)
    for engine in ("roi", "dense"):
        pairs = zip(results(engine, torch.float32), expected, strict=True)
        found[f"{case} {engine}"] = max(float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)
    return found


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """The network by torch in float32."""
    model = copy.deepcopy(model).to(x.device).eval()
    for layer in roi_layers(model).values():
        layer.engine = "dense"
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def main() -> None:
    out = Path(sys.argv[1])
    half = torch.float32 if DRY else torch.bfloat16
    if DRY:
        engines._MODULES["cpu"] = backend.__name__
        backend.available = lambda *_, **__: True  # type: ignore[assignment]
        sticky.forget()
        place.ARRANGED["cpu"] = place.ARRANGED["cuda"]
    card = "none" if DRY else torch.cuda.get_device_name()
    result: dict[str, Any] = {"card": card, "torch": torch.__version__, "triton": triton.__version__, "rows": []}

    def keep(**row: Any) -> None:
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    if not DRY:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            keep(check=str(dtype), wrong=wrong_results(DEVICE, dtype))
    torch.backends.cudnn.allow_tf32 = False
    for case, size in CASES.items():
        models = networks(case, size)
        keep(errors=errors(case, size, models))
        started = time.perf_counter()
        backend.forget()
        x = torch.rand(2, *size, device=DEVICE)
        F.cross_entropy(
            copy.deepcopy(models["tkn"]).to(DEVICE)(x), torch.zeros(2, dtype=torch.long).to(DEVICE)
        ).backward()
        if not DRY:
            torch.cuda.synchronize()
        keep(case=case, lists_and_first_step_ms=0.0 if DRY else 1e3 * (time.perf_counter() - started))
        for training, batches in ((False, INFERENCE), (True, TRAINING)):
            for batch in batches:
                x = torch.rand(batch, *size, device=DEVICE)
                images = x if training else x.to(half)
                runs: dict[str, Run] = {}
                for name, model in models.items():
                    for compiled in (False, True) if name != "tkn" and batch == 512 else (False,):
                        kind = f"{name}{' compiled' if compiled else ''}"
                        try:
                            made = prepared(model, half, name, training)
                            forward = torch.compile(made, mode="max-autotune-no-cudagraphs") if compiled else made
                            runs[kind] = captured(call(made, forward, images, half, training))
                        except Exception as error:  # the others are timed all the same
                            keep(case=case, batch=batch, training=training, failed=kind, why=repr(error)[:500])
                if not training:
                    plan = tkn.accelerate(models["tkn"], batch, size, device=DEVICE, dtype=half)
                    keep(case=case, batch=batch, plan_differs=difference(plan(images).float(), plain(models["tkn"], x)))
                    runs["tkn plan"] = captured(lambda plan=plan, images=images: plan(images))  # type: ignore[misc]
                for turn in range(2):
                    taken = {kind: 1e3 * seconds(run) for kind, run in runs.items()}
                    keep(case=case, batch=batch, training=training, turn=turn, ms=taken)
                runs.clear()


if __name__ == "__main__":
    main()
