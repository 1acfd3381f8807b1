"""Times two checkouts of the project against each other: python benchmarks/compare.py OLD NEW OUT.json [ROUNDS]

Either checkout has a process of its own with the paper's targeted networks and trained ROIs (of NEW's results/rois/):
plans for 1, 8 and 128 images, layer by layer in inference, and training steps. Each figure is timed in rounds, a turn
of either process a round. The figure is the ratio new / old of the two turns' medians: its median over the rounds, with
an interval of at least 95 %. Nothing else should run meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from turns import Side, interval, serve

CASES = (("tkn6", "tkn6_mnist", (1, 28, 28)), ("tdn10", "tdn10_tlmnist", (1, 56, 56)))


def figures(rois: Path) -> dict[str, Callable[[], object]]:
    """What is timed, with the `tkn` that is on the path."""
    import torch
    from torch import nn

    import tkn
    from tkn.layers import roi_layers

    made: dict[str, Callable[[], object]] = {}
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
            made[f"{name} plan, batch {batch}"] = lambda plan=plan, x=x: plan(x)
            made[f"{name} layer by layer, batch {batch}"] = torch.no_grad()(lambda model=model, x=x: model.eval()(x))

        def step(model: nn.Module = model, size: tuple[int, ...] = size) -> None:
            model.train().zero_grad()
            nn.functional.cross_entropy(model(torch.ones(128, *size)), torch.arange(128) % 10).backward()

        made[f"{name} training step, batch 128"] = step
    small, plain = tkn.TargetConv2d(8, 8, 3, padding=1, engine="dense"), nn.Conv2d(8, 8, 3, padding=1)
    x = torch.rand(1, 8, 16, 16)
    made["a small dense layer's call"] = torch.no_grad()(lambda: small(x))
    made["the same convolution's"] = torch.no_grad()(lambda: plain(x))
    return made


def main() -> None:
    if sys.argv[1] == "--serve":
        made = figures(Path(sys.argv[2]))
        serve(list(made), made.__getitem__)
        return
    paths, out = [Path(argument).resolve() for argument in sys.argv[1:3]], Path(sys.argv[3])
    rounds = int(sys.argv[4]) if len(sys.argv) > 4 else 20
    with tempfile.TemporaryDirectory() as folder:
        asked = ["--serve", str(paths[1] / "results" / "rois")]
        sides = [Side(__file__, asked, {**os.environ, "PYTHONPATH": str(path)}, folder) for path in paths]
        rows = {}
        for figure in sides[1].names:
            taken: tuple[list[float], list[float]] = ([], [])
            for turn in range(rounds):
                for side in (0, 1) if turn % 2 == 0 else (1, 0):
                    taken[side].append(sides[side].seconds(figure))
            ratios = [after / before for before, after in zip(*taken, strict=True)]
            old, new = (1e3 * median(one) for one in taken)
            low, high = interval(ratios)
            rows[figure] = {"old_ms": old, "new_ms": new, "ratio": median(ratios), "interval": [low, high]}
            print(f"{figure:36} {old:9.3f} {new:9.3f} ms  {median(ratios):.3f} [{low:.3f}, {high:.3f}]", flush=True)
        for side in sides:
            side.process.kill()
    out.write_text(json.dumps({"rounds": rounds, "figures": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
