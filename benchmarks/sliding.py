"""`tkn.slide` beside the same network over a batch of all crops, in turns, and what a shared convolution brings.

    python benchmarks/sliding.py --network tdn10 --rois results/rois/tdn10_mnist.json

Prints milliseconds for an image of 128x128 pixels, the medians of the turns:
    plan, all crops: a plan made for 128 windows, on one batch of all of them
    plan, slide: `tkn.slide` with the same plan
    plan, shared: the first convolution once for a row of windows, and a plan of what comes after it
    torch, crops; torch, shared: the network itself, without and with `tkn.slide`'s shared convolution
    first, crops; first, shared: the first convolution of the two alone
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import tkn
from tkn.bench.rois import load_rois
from tkn.crops import convolved_rows, in_batches, shares, windows_of

BATCH = 128
WINDOW = (28, 28)


def ways(model: nn.Module, image: Tensor, stride: int) -> dict[str, Callable[[], Tensor]]:
    """Name -> what gives the outputs of all windows [N, outputs]."""
    step = (stride, stride)
    windows = windows_of(image, WINDOW, step)
    count = windows.shape[0] * windows.shape[1]
    plan = tkn.accelerate(model, BATCH, (1, *WINDOW))

    def crops() -> Tensor:
        return windows.reshape(count, 1, *WINDOW)

    def slid(network: nn.Module) -> Callable[[], Tensor]:
        return lambda: tkn.slide(network, image, step, window=WINDOW).scores.flatten(1).T

    found: dict[str, Callable[[], Tensor]] = {"plan, all crops": lambda: plan(crops()), "plan, slide": slid(plan)}
    found["torch, crops"] = lambda: torch.cat([model(batch) for batch in in_batches(windows, 32)])
    first = model[0] if isinstance(model, nn.Sequential) else model
    if isinstance(model, nn.Sequential) and shares(first, WINDOW):
        rest = tkn.accelerate(model[1:], BATCH, (first.out_channels, *WINDOW))
        found["plan, shared"] = lambda: torch.cat(
            [rest(batch) for batch in in_batches(convolved_rows(first, image, WINDOW, step), BATCH)]
        )
        found["torch, shared"] = slid(model)
        found["first, crops"] = lambda: torch.stack([first(batch)[0, 0] for batch in in_batches(windows, 32)])
        found["first, shared"] = lambda: torch.stack([row[0, 0] for row in convolved_rows(first, image, WINDOW, step)])
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="tdn10")
    parser.add_argument("--rois", type=Path, help="a file of results/rois")
    parser.add_argument("--strides", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = tkn.build_model(options.network, (1, *WINDOW), 10).eval()
    if options.rois is not None:
        load_rois(model, options.rois)
    for stride in options.strides:
        made = ways(model, torch.rand(1, 128, 128), stride)
        want = made["torch, crops"]()
        times: dict[str, list[float]] = {name: [] for name in made}
        for name, run in made.items():  # once to warm up
            outputs = run()
            if not name.startswith("first"):
                torch.testing.assert_close(outputs, want, rtol=1e-3, atol=1e-3)
        for _ in range(options.turns):
            for name, run in made.items():
                began = time.perf_counter()
                run()
                times[name].append(1000 * (time.perf_counter() - began))
        ratios = [a / b for a, b in zip(times["plan, all crops"], times["plan, slide"], strict=True)]
        row = ", ".join(f"{name.replace(',', '')} {median(values):.1f}" for name, values in times.items())
        print(f"{options.network}, stride {stride}, {len(want)} windows: {row}; ", end="")
        print(f"slide {median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    main()
