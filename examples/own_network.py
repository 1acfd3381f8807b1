"""Your own trained network: converted, trained to fewer multiply-adds, timed, and saved as a plan.

Here a small ResNet is trained first on made-up images, whose class is the pattern at a fixed place; put your network
and your batches in the places of `network` and `batches`. `python examples/own_network.py` takes a minute or two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tkn

CLASSES = 4


class Block(nn.Module):
    """A residual block: [B, C, H, W] -> [B, C', H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def network(width: int) -> nn.Module:
    """[B, 3, H, W] -> [B, CLASSES]."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(Block(width, width, 2), Block(width, 2 * width, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES)),
    )


def batches(count: int, images: int, side: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise [B, 3, side, side] with stripes in its upper left quarter, and their direction and period as labels [B]."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(*[torch.arange(side // 2)] * 2, indexing="ij")
    patterns = torch.stack([(axis // period % 2).float() for axis in (rows, columns) for period in (1, 2)])
    for _ in range(count):
        labels = torch.randint(CLASSES, (images,), generator=generator)
        x = torch.randn(images, 3, side, side, generator=generator)
        x[:, :, : side // 2, : side // 2] += patterns[labels][:, None]
        yield x, labels


@torch.no_grad()
def error(scores: Callable[[Tensor], Tensor], test: list[tuple[Tensor, Tensor]]) -> float:
    """Percent of the test images that are classified wrongly."""
    return 100 * torch.cat([scores(x).argmax(1) != labels for x, labels in test]).float().mean().item()


def milliseconds(scores: Callable[[Tensor], Tensor], x: Tensor, calls: int) -> float:
    """Of a call, the median of so many after a first one."""
    taken = []
    with torch.inference_mode():
        scores(x)
        for _ in range(calls):
            started = time.perf_counter()
            scores(x)
            taken.append(1000 * (time.perf_counter() - started))
    return sorted(taken)[calls // 2]


def train(model: nn.Module, data: Iterator[tuple[Tensor, Tensor]], lr: float, budget: tkn.Budget | None = None) -> None:
    """One pass over `data`; with a `budget` the ROIs shrink to it."""
    optimizer = torch.optim.SGD(tkn.parameter_groups(model, weight_decay=1e-4), lr=lr, momentum=0.9, nesterov=True)
    model.train()
    for x, labels in data:
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if budget is not None:
            budget.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, help="pixels of an image's side")
    parser.add_argument("--width", type=int, default=16, help="channels of the first layer")
    parser.add_argument("--steps", type=int, default=150, help="of each of the two trainings")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--share", type=float, default=0.33, help="of the multiply-adds, to be left")
    parser.add_argument("--out", default="own_network.plan", help="where the plan goes")
    options = parser.parse_args()
    torch.manual_seed(0)
    size = (3, options.side, options.side)
    test = list(batches(8, options.batch, options.side, seed=1))

    dense = network(options.width)
    train(dense, batches(options.steps, options.batch, options.side, seed=0), lr=0.05)
    print(f"trained network:    {error(dense.eval(), test):.1f} % wrong")

    model = tkn.targetize(dense)
    print(f"as it is converted: {error(model.eval(), test):.1f} % wrong")

    budget = tkn.Budget(model, size, share=options.share, steps=options.steps // 2)
    train(model, batches(options.steps, options.batch, options.side, seed=2), lr=0.02, budget=budget)
    count = tkn.count_macs(model, size)
    print(f"trained further:    {error(model.eval(), test):.1f} % wrong")
    print(f"multiply-adds:      {count.total_roi:,} of {count.total_dense:,}")

    names = ["rows 1", "rows 2", "columns 1", "columns 2"]
    plan = tkn.accelerate(model, batch_size=options.batch, input_size=size, classes=names)
    print(f"as a plan:          {error(plan, test):.1f} % wrong")
    x, _ = test[0]
    for name, scores in (("dense, torch", dense.eval()), ("plan", plan)):
        print(f"{name}: {milliseconds(scores, x, calls=20):.2f} ms for {options.batch} images")
    plan.save(options.out)
    print(f"saved: {options.out}")


if __name__ == "__main__":
    main()
