"""The kernels of plans against torch, as a program: `python -m tkn.plan.check` ends with an error if they disagree."""

from __future__ import annotations

import sys

import torch
from torch import nn

from tkn.backends.cpu.build import available, kernels
from tkn.layers import TargetConv2d
from tkn.plan.capture import build_graph, frozen
from tkn.plan.compare import difference, random_images
from tkn.plan.graph import Graph
from tkn.plan.parts import MapPart, Program, RowPart, Scratch, numbers, split
from tkn.sequential import TargetSequential

_TOLERANCE = 1e-4
_SIZE = (1, 12, 12)
_BATCHES = (1, 5, 40)


def check_plans() -> None:
    """RuntimeError if a plan in either arrangement does not compute what torch does."""
    graph = _graph()
    (nodes,) = split(graph)
    width = kernels(torch.float32).tkn_width()
    parts = {
        "maps": MapPart(graph, nodes),
        **{f"{n * width} lanes": RowPart(graph, nodes, n * width, Scratch(numbers)) for n in (1, 2, 4)},
    }
    for batch in _BATCHES:
        x = random_images(batch, _SIZE)
        expected = Program.by_torch(graph)(x)
        for name, part in parts.items():
            error = difference(Program(graph, [part])(x), expected)
            if error > _TOLERANCE:
                raise RuntimeError(f"the compiled kernels compute plans wrongly ({name}: relative error {error:.1e})")


def _graph() -> Graph:
    torch.manual_seed(0)
    model = TargetSequential(
        TargetConv2d(1, 20, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        TargetConv2d(20, 18, 3, padding=1),
        nn.BatchNorm2d(18),
        nn.ReLU(),
        nn.MaxPool2d(3, 1, 1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(18 * 9, 7),
    )
    for module in model:
        if isinstance(module, TargetConv2d):
            nn.init.uniform_(module.scale, 0.2, 0.8)
            nn.init.uniform_(module.loc, 0.2, 0.8)
    return build_graph(frozen(model), _SIZE)


def main() -> None:
    if not available(torch.float32):
        sys.exit("there are no kernels")
    with torch.no_grad():
        check_plans()


if __name__ == "__main__":
    main()
