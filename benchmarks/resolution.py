"""Errors of networks trained on MNIST, on its test digits scaled to other sizes.

python benchmarks/resolution.py CHECKPOINT...

Each network is taken to each size by `tkn.at_resolution` and computed by a plan. Digits are scaled bilinearly
(antialiased). Prints a row of a Markdown table for each checkpoint: the error in percent, and in brackets the
multiply-adds in millions.
"""

from __future__ import annotations

import argparse
import os

import torch
from torch.nn import functional as F

import tkn
from tkn.data import load_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="of runs of tkn-run with data=mnist")
    parser.add_argument("--sides", type=int, nargs="+", default=[20, 28, 42, 56], help="pixels of a digit's image")
    parser.add_argument("--source", default="auto", help="as data.source")
    parser.add_argument("--limit", type=int, default=10_000, help="test images, the first ones")
    options = parser.parse_args()
    data = load_data("mnist", os.environ.get("TKN_DATA_DIR", "datasets"), source=options.source)
    test = data.test.select(slice(options.limit))
    print(f"{len(test)} test images, {data.source}")
    print("| network | " + " | ".join(f"{side}x{side}" for side in options.sides) + " |")
    for path in options.checkpoints:
        trained = tkn.load_model(path)
        cells = []
        for side in options.sides:
            model = tkn.at_resolution(trained, (1, side, side))
            plan = tkn.accelerate(model, 128, (1, side, side))
            wrong = 0
            for begin in range(0, len(test), 1024):
                part = test.select(slice(begin, begin + 1024))
                images = F.interpolate(data.inputs(part), (side, side), mode="bilinear", antialias=True)
                wrong += int((plan(images).argmax(1) != part.targets).sum())
            macs = tkn.count_macs(model, (1, side, side)).total_roi
            cells.append(f"{100 * wrong / len(test):.2f} ({macs / 1e6:.1f}M)")
        print(f"| {path} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
