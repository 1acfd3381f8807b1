"""Digits found on large pages of MNIST digits and clutter: a network for windows of 28x28 pixels is slid over them.

A TDN10 learns eleven classes, ten digits and "no digit in the middle", on windows of pages that are made as it goes;
then its plan goes over pages of test digits. `python examples/find_digits.py` takes a few minutes on two cores and
writes find_digits.png. MNIST is looked for as by `tkn-run data=mnist`: without a network 5,000 digits that come with
a package do.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

import tkn
from tkn.data import load_data
from tkn.sliding import Detections, WindowScores

SIDE = 28
NOTHING = 10
#: Pixels that a window may be off a digit and still show it, and from which on it shows none.
NEAR, FAR = 1, 5


@dataclass(frozen=True)
class Page:
    """An image [1, H, W] with digits at corners (top, left) [N, 2] of squares of 28 pixels, and which they are [N]."""

    image: Tensor
    corners: Tensor
    labels: Tensor


def page(digits: Tensor, labels: Tensor, side: int, count: int, random: torch.Generator) -> Page:
    """At most `count` of the digits [N, 1, 28, 28], apart from each other, among pieces of others."""

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=random)

    image = torch.zeros(1, side, side)
    for which, (y, x), (top, left) in zip(
        draw(len(digits), 4 * count).tolist(),
        draw(SIDE - 9, 4 * count, 2).tolist(),
        draw(side - 9, 4 * count, 2).tolist(),
        strict=True,
    ):
        place = image[:, top : top + 9, left : left + 9]
        torch.maximum(place, digits[which][:, y : y + 9, x : x + 9], out=place)
    corners: list[tuple[int, int]] = []
    for top, left in draw(side - SIDE + 1, 20 * count, 2).tolist():
        apart = all(max(abs(top - y), abs(left - x)) >= SIDE - 4 for y, x in corners)
        if apart and len(corners) < count:
            corners.append((top, left))
    chosen = draw(len(digits), len(corners))
    for which, (top, left) in zip(chosen.tolist(), corners, strict=True):
        place = image[:, top : top + SIDE, left : left + SIDE]
        torch.maximum(place, digits[which], out=place)
    return Page(image, torch.tensor(corners), labels[chosen])


def windows(made: Page, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows [B, 1, 28, 28] of a page, a third of them with a digit in the middle, and their classes [B]."""
    room = made.image.shape[1] - SIDE
    shifts = torch.randint(-NEAR, NEAR + 1, (2, len(made.corners), 2), generator=random)
    on = (made.corners + shifts).clamp(0, room).flatten(0, 1)
    off = torch.randint(room + 1, (8 * len(on), 2), generator=random)
    off = off[((off[:, None] - made.corners).abs().amax(2) >= FAR).all(1)][: 2 * len(on)]
    crops = [made.image[:, y : y + SIDE, x : x + SIDE] for y, x in torch.cat((on, off)).tolist()]
    return torch.stack(crops), torch.cat((made.labels.repeat(2), torch.full((len(off),), NOTHING)))


def train(model: torch.nn.Module, digits: Tensor, labels: Tensor, steps: int, share: float) -> None:
    """A page a step; the ROIs shrink to `share` of the multiply-adds in the first half."""
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(tkn.parameter_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.2)
    budget = tkn.Budget(model, (1, SIDE, SIDE), share=share, steps=max(1, steps // 2))
    model.train().to(memory_format=torch.channels_last)
    for _ in range(steps):
        x, y = windows(page(digits, labels, 5 * SIDE, 12, random), random)
        x = x.contiguous(memory_format=torch.channels_last)  # faster here
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.step()
        schedule.step()


def matches(made: Page, found: Detections) -> tuple[Tensor, Tensor]:
    """Which of the page's digits were found as what they are, and which detections are right: bool [N], [M]."""
    corners = found.boxes[:, [1, 0]]
    right = (corners[None] - made.corners[:, None]).abs().amax(2) < FAR
    right &= found.labels[None] == made.labels[:, None]
    return right.any(1), right.any(0)


def picture(made: Page, scores: WindowScores, found: Detections) -> Figure:
    """The page with what was found, and the probability that there is a digit."""
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(1 - made.image[0], cmap="gray")
    told, true = matches(made, found)
    for (x, y, *_), label, is_true in zip(found.boxes.tolist(), found.labels.tolist(), true.tolist(), strict=True):
        colour = "tab:green" if is_true else "tab:red"
        left.add_patch(Rectangle((x - 0.5, y - 0.5), SIDE, SIDE, fill=False, edgecolor=colour))
        left.text(x + 1, y + 1, str(label), color=colour, fontsize=7, va="top")
    for y, x in made.corners[~told].tolist():
        left.add_patch(Rectangle((x - 0.5, y - 0.5), SIDE, SIDE, fill=False, edgecolor="tab:red", linestyle=":"))
    left.set_title("found (red: wrongly; dotted: missed)", fontsize=9)
    heat = right.imshow(scores.heat_map()[:NOTHING].sum(0), cmap="viridis")
    right.set_title("heat map: mean probability of a digit", fontsize=9)
    figure.colorbar(heat, ax=right, shrink=0.8)
    for axis in (left, right):
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="auto", help="of MNIST: auto, full or embedded")
    parser.add_argument("--steps", type=int, default=600, help="of the training, a page of twelve digits each")
    parser.add_argument("--share", type=float, default=0.5, help="of the multiply-adds, to be left")
    parser.add_argument("--pages", type=int, default=5, help="to be searched")
    parser.add_argument("--side", type=int, default=256, help="pixels of a page's side")
    parser.add_argument("--stride", type=int, default=2, help="pixels from window to window")
    parser.add_argument("--threshold", type=float, default=0.5, help="least probability of a digit")
    parser.add_argument("--out", default="find_digits.png", help="where the picture of the first page goes")
    options = parser.parse_args()
    torch.manual_seed(0)
    data = load_data("mnist", os.environ.get("TKN_DATA_DIR", "datasets"), source=options.source)

    model = tkn.build_model("tdn10", (1, SIDE, SIDE), 11)
    began = time.perf_counter()
    train(model, data.inputs(data.train), data.train.targets, options.steps, options.share)
    macs = tkn.count_macs(model, (1, SIDE, SIDE))
    print(f"trained in {time.perf_counter() - began:.0f} s; {macs.total_roi:,} of {macs.total_dense:,} multiply-adds")

    plan = tkn.accelerate(model, 128, (1, SIDE, SIDE))
    random = torch.Generator().manual_seed(1)
    digits, count = data.inputs(data.test), (options.side // 50) ** 2
    pages = [page(digits, data.test.targets, options.side, count, random) for _ in range(options.pages)]
    tkn.slide(plan, pages[0].image, options.stride)  # once to warm up
    began = time.perf_counter()
    slid = [tkn.slide(plan, made.image, options.stride) for made in pages]
    seconds = time.perf_counter() - began
    found = [scores.detections(options.threshold, background=NOTHING) for scores in slid]
    right = [matches(made, detections) for made, detections in zip(pages, found, strict=True)]
    total, told = sum(len(made.labels) for made in pages), sum(int(digits.sum()) for digits, _ in right)
    wrong = sum(int((~true).sum()) for _, true in right)
    print(f"{told} of {total} digits found, {wrong} wrong boxes, on {len(pages)} pages")
    count = sum(scores.scores[0].numel() for scores in slid)
    print(f"{len(pages) / seconds:.2f} pages of {options.side}x{options.side} a second, {count / seconds:.0f} windows")
    picture(pages[0], slid[0], found[0]).savefig(options.out, dpi=150)
    print(f"saved: {options.out}")


if __name__ == "__main__":
    main()
