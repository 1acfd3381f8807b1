"""How near engine="auto" comes to the better engine: python benchmarks/auto.py OUT.json [LAYERS [ROUNDS]]

Random layers (of tkn.bench.costs, but not those that the cost model was fitted to) are timed in processes in turns:
"roi", "dense", "auto" untuned, and "auto" after tkn.tune. A layer's figure is the median over the rounds of its time
under auto, as a part of the better engine's, with the smallest and the largest. Nothing else should run meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch

import tkn
from tkn.backends.cpu import build
from tkn.bench.costs import least, random_layer, step

SEED = 1000
MODES = ("roi", "dense", "auto", "tuned")


def measure(mode: str, count: int) -> list[dict[str, Any]]:
    """The layers, and seconds of each in a mode."""
    random = Random(SEED)
    torch.manual_seed(SEED)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        drawn = random_layer(random)
        if drawn is None:
            continue
        network, x, work, half = drawn
        x.requires_grad_(False)  # as a network's first layer, which is all of this one
        for module in network:
            if isinstance(module, tkn.TargetConv2d):
                module.engine = "auto" if mode == "tuned" else mode
        if mode == "tuned":
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                tkn.tune(network, len(x), tuple(x.shape[1:]), training=work.training)
        shape = f"{work.channels}->{work.outputs} {work.kernel[0]}x{work.kernel[0]} {work.size[0]}px batch {work.batch}"
        about = f"{shape} share {work.share:.2f}{' training' if work.training else ''}{' bfloat16' if half else ''}"
        rows.append({"layer": about, "seconds": least(step(network, x, work.training, half))})
    return rows


def main() -> None:
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
        return
    out = Path(sys.argv[1])
    count, rounds = (int(argument) for argument in (sys.argv[2:] + ["24", "5"][len(sys.argv) - 2 :])[:2])
    checkout = str(Path(__file__).resolve().parents[1])
    build.kernels(torch.float32)
    kernels = list(build.cache_dir().glob("tkn_engine_float_*"))
    taken: dict[str, list[list[dict[str, Any]]]] = {mode: [] for mode in MODES}
    for turn in range(rounds):
        for mode in MODES if turn % 2 == 0 else reversed(MODES):
            command = [sys.executable, str(Path(__file__).resolve()), "--measure", mode, str(count)]
            with tempfile.TemporaryDirectory() as folder:
                # The kernels are there; what was tuned is not.
                for compiled in kernels:
                    shutil.copytree(compiled, Path(folder) / compiled.name)
                environment = {**os.environ, "PYTHONPATH": checkout, "TKN_CACHE_DIR": folder}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            taken[mode].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    rows = []
    for number in range(count):
        seconds = {mode: [turn[number]["seconds"] for turn in taken[mode]] for mode in MODES}
        best = min(median(seconds["roi"]), median(seconds["dense"]))
        row: dict[str, Any] = {"layer": taken["roi"][0][number]["layer"], "best_ms": 1e3 * best}
        for mode in ("auto", "tuned"):
            ratios = sorted(one / best for one in seconds[mode])
            row[mode] = [median(ratios), ratios[0], ratios[-1]]
        rows.append(row)
        print(f"{row['layer']:64} {row['best_ms']:9.3f} ms  auto {row['auto'][0]:.2f}  tuned {row['tuned'][0]:.2f}")
    for mode, most in (("auto", 1.15), ("tuned", 1.05)):
        within = sum(row[mode][0] <= most for row in rows)
        print(f"{mode}: within {most - 1:.0%} of the better engine in {within} of {count} layers")
    out.write_text(json.dumps({"rounds": rounds, "layers": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
