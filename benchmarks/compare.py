"""Times two checkouts of the project against each other: python benchmarks/compare.py OLD NEW OUT.json [ROUNDS]

Each round starts a process for either checkout in turns, which times the paper's targeted networks with trained ROIs
(of NEW's results/rois/): plans for 1, 8 and 128 images, layer by layer in inference, and training steps. The figure is
the ratio new / old of the medians within a round: its median over the rounds, and a 95 % interval of that. Nothing else
should run meanwhile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from math import comb
from pathlib import Path
from statistics import median

CASES = (("tkn6", "tkn6_mnist", (1, 28, 28)), ("tdn10", "tdn10_tlmnist", (1, 56, 56)))


def measure(rois: Path) -> dict[str, float]:
    """Median seconds of each figure, with the `tkn` that is on the path."""
    import time

    import torch
    from torch import nn

    import tkn
    from tkn.layers import roi_layers

    def taken(run: Callable[[], object], least: int = 7, seconds: float = 1.5) -> float:
        run()
        run()
        times: list[float] = []
        while len(times) < least or sum(times) < seconds:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return median(times)

    found: dict[str, float] = {}
    for name, file, size in CASES:
        torch.manual_seed(0)
        model = tkn.build_model(name, size, 10, engine="roi")
        layers = json.loads((rois / f"{file}.json").read_text(encoding="utf-8"))["layers"]
        with torch.no_grad():
            for layer_name, layer in roi_layers(model).items():
                layer.loc.copy_(torch.tensor(layers[layer_name]["loc"]))
                layer.scale.copy_(torch.tensor(layers[layer_name]["scale"]))
        model.eval()
        for batch in (1, 8, 128):
            plan, x = tkn.accelerate(model, batch, size), torch.rand(batch, *size)
            found[f"{name} plan, batch {batch}"] = taken(lambda plan=plan, x=x: plan(x))
            with torch.no_grad():
                found[f"{name} layer by layer, batch {batch}"] = taken(lambda model=model, x=x: model(x))
        model.train()
        x, labels = torch.rand(128, *size), torch.arange(128) % 10

        def step(model: nn.Module = model, x: torch.Tensor = x, labels: torch.Tensor = labels) -> None:
            model.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()

        found[f"{name} training step, batch 128"] = taken(step)
    small, plain, x = tkn.TargetConv2d(8, 8, 3, padding=1, engine="dense"), nn.Conv2d(8, 8, 3, padding=1), None
    x = torch.rand(1, 8, 16, 16)
    with torch.no_grad():
        found["a small dense layer's call"] = taken(lambda: small(x), 3000, 0.0)
        found["the same convolution's"] = taken(lambda: plain(x), 3000, 0.0)
    return found


def run(checkout: Path, rois: Path) -> dict[str, float]:
    """`measure` in a process of its own, on the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(rois)]
    with tempfile.TemporaryDirectory() as elsewhere:  # the working folder comes first on the path
        done = subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def interval(values: list[float]) -> tuple[float, float]:
    """Of the median, at least 95 % where there are six values or more, by the signs of the differences; else all."""
    ordered, n = sorted(values), len(values)
    cut = 0
    while 2 * sum(comb(n, k) for k in range(cut + 1)) / 2**n <= 0.05:
        cut += 1
    low = max(0, cut - 1)
    return ordered[low], ordered[n - 1 - low]


def main() -> None:
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(Path(sys.argv[2]))))
        return
    old, new, out = (Path(argument).resolve() for argument in sys.argv[1:4])
    rounds = int(sys.argv[4]) if len(sys.argv) > 4 else 6
    rois = new / "results" / "rois"
    results: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    for turn in range(rounds):
        for side in ("old", "new") if turn % 2 == 0 else ("new", "old"):
            results[side].append(run(old if side == "old" else new, rois))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    rows = {}
    for what in results["new"][0]:
        ratios = [after[what] / before[what] for before, after in zip(results["old"], results["new"], strict=True)]
        low, high = interval(ratios)
        before, after = (median(one[what] for one in results[side]) for side in ("old", "new"))
        rows[what] = {"old_ms": 1e3 * before, "new_ms": 1e3 * after, "ratio": median(ratios), "interval": [low, high]}
        print(f"{what:36} {1e3 * before:9.3f} {1e3 * after:9.3f} ms  {median(ratios):.3f} [{low:.3f}, {high:.3f}]")
    out.write_text(json.dumps({"rounds": rounds, "figures": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
