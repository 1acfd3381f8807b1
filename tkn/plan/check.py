"""The kernels of plans against torch, as a program: `python -m tkn.plan.check` ends with an error if they disagree."""

from __future__ import annotations

import sys

import torch
from torch import nn

from tkn.backends.cpu.build import available, kernels
from tkn.layers import TargetConv2d
from tkn.plan.capture import build_graph, frozen
from tkn.plan.compare import difference, random_inputs
from tkn.plan.graph import Graph
from tkn.plan.parts import MapPart, Part, Program, RowPart, Scratch, numbers, split
from tkn.sequential import TargetSequential

_TOLERANCE, _PAIRED_TOLERANCE = 1e-4, 2e-2
_BATCHES = (1, 5, 40)


def check_plans() -> None:
    """RuntimeError if a plan in either arrangement does not compute what torch does."""
    torch.manual_seed(0)
    for graph in (_narrow(), _wide()):
        _check(graph)


def _check(graph: Graph) -> None:
    (nodes,) = split(graph)
    half = kernels(torch.float32).tkn_width() // 2
    parts: dict[str, Part] = {}
    for pairs in (False, True)[: 1 + kernels(torch.float32).tkn_bfloat16()]:
        kind = ", bfloat16" if pairs else ""
        parts[f"maps{kind}"] = MapPart(graph, nodes, pairs=pairs)
        for lanes in (half, 2 * half, 4 * half, 8 * half):
            parts[f"{lanes} lanes{kind}"] = RowPart(graph, nodes, lanes, Scratch(numbers), pairs=pairs)
    for batch in _BATCHES:
        (x,) = random_inputs(batch, graph.input_shapes)
        expected = Program.by_torch(graph)(x)
        for name, part in parts.items():
            error = difference(Program(graph, [part])(x), expected)
            if error > (_PAIRED_TOLERANCE if part.paired else _TOLERANCE):
                raise RuntimeError(f"the compiled kernels compute plans wrongly ({name}: relative error {error:.1e})")


def _narrow() -> Graph:
    """Vectors over the channels, where there is one image."""
    return _graph(
        (1, 12, 12),
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


def _wide() -> Graph:
    """Vectors along the rows."""
    return _graph(
        (1, 20, 40),
        TargetConv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.SiLU(),
        TargetConv2d(12, 10, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(10, 10, 3, stride=2, padding=1, groups=10),
        nn.AvgPool2d(2),
        nn.Conv2d(10, 8, 1),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 3, 3),
    )


def _graph(size: tuple[int, int, int], *layers: nn.Module) -> Graph:
    model = TargetSequential(*layers)
    for module in model:
        if isinstance(module, TargetConv2d):
            nn.init.uniform_(module.scale, 0.2, 0.8)
            nn.init.uniform_(module.loc, 0.2, 0.8)
    return build_graph(frozen(model.eval()), size)


def main() -> None:
    if not available(torch.float32):
        sys.exit("there are no kernels")
    with torch.no_grad():
        check_plans()


if __name__ == "__main__":
    main()
