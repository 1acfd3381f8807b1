"""A plan used without the code that trained it: `python examples/use_plan.py own_network.plan`.

The file is data and holds all that the network needs. Loading it executes nothing in it; its first call arranges the
plan for this machine, which takes a few seconds. Here the images are noise; scale yours as those of the training were.
"""

from __future__ import annotations

import argparse

import torch

import tkn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="the file that Plan.save wrote")
    parser.add_argument("--side", type=int, default=32, help="pixels of an image's side, as in training")
    parser.add_argument("--images", type=int, default=4, help="how many images")
    options = parser.parse_args()

    plan = tkn.load_plan(options.plan)
    torch.manual_seed(0)
    scores = plan(torch.randn(options.images, 3, options.side, options.side))
    for number, row in enumerate(scores.softmax(1)):
        best = int(row.argmax())
        name = best if plan.classes is None else plan.classes[best]
        print(f"image {number}: {name} ({row[best]:.0%})")


if __name__ == "__main__":
    main()
