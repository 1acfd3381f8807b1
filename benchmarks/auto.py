"""How near engine="auto" comes to the better engine: python benchmarks/auto.py OUT.json [LAYERS [ROUNDS]]

Random layers (of tkn.bench.costs, but not those that the cost model was fitted to) are timed in four processes in
turns: "roi", "dense", "auto" untuned, and "auto" after tkn.tune. A layer's figure is its time under auto as a part of
the better engine's in the same round, which engine that is being decided over all rounds: the median, with an interval.
Nothing else should run meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from turns import Side, interval, serve

import tkn
from tkn.backends.cpu import build
from tkn.bench.costs import random_layer, step

SEED = 1000
MODES = ("roi", "dense", "auto", "tuned")


def layer(number: int, mode: str) -> tuple[str, Callable[[], object]]:
    """A random layer by its number, in words, and its pass under a mode."""
    drawn, random = None, Random(SEED + number)
    torch.manual_seed(SEED + number)
    while drawn is None:
        drawn = random_layer(random)
    network, x, work, half = drawn
    # As a network's first layer, which is all of this one.
    x.requires_grad_(False)
    for module in network:
        if isinstance(module, tkn.TargetConv2d):
            module.engine = "auto" if mode == "tuned" else mode  # type: ignore[assignment]
    if mode == "tuned":
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            tkn.tune(network, len(x), tuple(x.shape[1:]), training=work.training)
    shape = f"{work.channels}->{work.outputs} {work.kernel[0]}x{work.kernel[0]} {work.size[0]}px batch {work.batch}"
    about = f"{shape} share {work.share:.2f}{' training' if work.training else ''}{' bfloat16' if half else ''}"
    return about, step(network, x, work.training, half)


def serve_layers(mode: str, count: int) -> None:
    """One layer at a time: together they would not fit into memory."""
    made: dict[str, Callable[[], object]] = {}
    names = [f"{number} {layer(number, 'dense')[0]}" for number in range(count)]

    def of(name: str) -> Callable[[], object]:
        if name not in made:
            made.clear()
            made[name] = layer(int(name.split()[0]), mode)[1]
        return made[name]

    serve(names, of)


def main() -> None:
    if sys.argv[1] == "--serve":
        serve_layers(sys.argv[2], int(sys.argv[3]))
        return
    out, numbers = Path(sys.argv[1]), [int(argument) for argument in sys.argv[2:]]
    count, rounds = numbers[0] if numbers else 24, numbers[1] if len(numbers) > 1 else 7
    checkout = str(Path(__file__).resolve().parents[1])
    build.kernels(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for mode in MODES:
            cache = Path(folder) / mode
            # The kernels are there; what was tuned is not.
            for compiled in build.cache_dir().glob("tkn_engine_float_*"):
                shutil.copytree(compiled, cache / compiled.name)
            environment = {**os.environ, "PYTHONPATH": checkout, "TKN_CACHE_DIR": str(cache)}
            sides[mode] = Side(__file__, ["--serve", mode, str(count)], environment, folder)
        rows = [measured(sides, name, rounds) for name in sides["auto"].names]
        for side in sides.values():
            side.process.kill()
    for mode, most in (("auto", 1.15), ("tuned", 1.05)):
        within = sum(row[mode][0] <= most for row in rows)
        print(f"{mode}: within {most - 1:.0%} of the better engine in {within} of {count} layers")
    out.write_text(json.dumps({"rounds": rounds, "layers": rows}, indent=1) + "\n", encoding="utf-8")


def measured(sides: dict[str, Side], name: str, rounds: int) -> dict[str, Any]:
    """A layer's figures."""
    taken: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(rounds):
        for mode in MODES if turn % 2 == 0 else reversed(MODES):
            taken[mode].append(sides[mode].seconds(name))
    best = min(("roi", "dense"), key=lambda mode: median(taken[mode]))
    row: dict[str, Any] = {"layer": name, "better": best, "ms": 1e3 * median(taken[best])}
    row["other"] = median(taken["dense" if best == "roi" else "roi"]) / median(taken[best])
    for mode in ("auto", "tuned"):
        ratios = [one / least for one, least in zip(taken[mode], taken[best], strict=True)]
        row[mode] = [median(ratios), *interval(ratios)]
    figures = f"the other x {row['other']:.2f}  auto {row['auto'][0]:.2f}  tuned {row['tuned'][0]:.2f}"
    print(f"{name:68} {best:5} {row['ms']:9.3f} ms  {figures}", flush=True)
    return row


if __name__ == "__main__":
    main()
