"""Plans of which torch computes the parts that it computes faster."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, cycle, repeat

import pytest
import torch
from engine_cases import assert_near, targeted
from plan_networks import NETWORKS, network
from torch import Tensor, nn

from tkn import TargetConv2d, accelerate
from tkn.plan import arrange
from tkn.plan.capture import build_graph, frozen
from tkn.plan.mixed import FoldedPart, mixed
from tkn.plan.parts import KernelPart, Part, Program


class Block(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv, self.norm = TargetConv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out)
        self.second, self.short = nn.Conv2d(out, out, 3, padding=1), nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.norm(self.conv(x)))) + self.short(x))


def blocks() -> nn.Module:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return targeted(nn.Sequential(*(Block(c, o) for c, o in ((2, 6), (6, 6), (6, 8), (8, 8))), head), seed=1).eval()


def kernels_of(model: nn.Module, size: tuple[int, ...], small: bool) -> tuple[Program, Callable[[list[int]], Part]]:
    graph = build_graph(frozen(model), size)
    lanes = None if small else 16
    program = Program(graph, list(arrange._parts(graph, lanes, pairs=False)), "kernels")
    return program, lambda nodes: arrange._kernel_part(
        graph, nodes, lanes, arrange.Scratch(arrange.numbers), pairs=False
    )


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@torch.no_grad()
def test_pieces_by_turns(small: bool, channels_last: bool) -> None:
    model, size = blocks(), (2, 9, 11)
    program, make = kernels_of(model, size, small)
    # Of a piece the kernels are asked first, then torch, which is faster at every other one.
    costs = cycle([1.0, 2.0, 2.0, 1.0])
    made, left = mixed(program, make, lambda _: next(costs), channels_last=channels_last)
    assert made is not None
    kinds = [KernelPart if isinstance(part, KernelPart) else type(part) for part in made.parts]
    assert kinds[:3] == [KernelPart, FoldedPart, KernelPart]
    assert [(part.engine, part.torch) for part in left] == [(2.0, 1.0)] * kinds.count(FoldedPart)
    assert made.way == "kernels, parts by torch"
    # The pieces end where blocks do: what follows a convolution stays with it.
    assert all("relu" in part.last for part in left[:-1])
    for batch in (1, 5, 17):
        x = torch.rand(batch, *size)
        assert_near(made(x), model(x))


@pytest.mark.parametrize("name", ["tdn10", "residual", "groups", "plain"])
@torch.no_grad()
def test_networks_with_their_first_piece_by_torch(name: str) -> None:
    model, size = network(name), NETWORKS[name][1]
    program, make = kernels_of(model, size, small=True)
    costs = chain([2.0, 1.0], repeat(1.0))
    made, (part,) = mixed(program, make, lambda _: next(costs), channels_last=True)
    assert made is not None
    assert isinstance(made.parts[0], FoldedPart)
    assert part.first == next(node.name for node in program.graph.nodes[1:])
    x = torch.rand(3, *size)
    assert_near(made(x), model(x))


def test_all_or_nothing_is_no_mixture() -> None:
    program, make = kernels_of(blocks(), (2, 9, 11), small=True)
    for torch_costs, pieces in ((2.0, 0), (1.0, 5)):
        costs = cycle([1.5, torch_costs])
        made, left = mixed(program, make, lambda _, costs=costs: next(costs), channels_last=False)
        assert made is None
        assert len(left) == pieces


@torch.no_grad()
def test_what_is_left_to_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = blocks(), torch.rand(4, 2, 9, 11)
    assert accelerate(model, 4).left_to_torch == ()
    # As if torch computed the whole in half of the kernels' time, and the two of them by turns faster still.
    whole = {"torch": 1.0, "torch, channels last": 1.1}
    costs = cycle([1.0, 2.0, 2.0, 1.0])

    def seconds(run: Callable[[], object], best: float) -> float:
        del best
        of = run.func.__self__ if hasattr(run.func, "__self__") else run.func
        if isinstance(of, Program):
            return whole.get(of.way, 0.5 if "parts by torch" in of.way else 2.0)
        return next(costs)

    monkeypatch.setattr(arrange, "_seconds", seconds)
    plan = accelerate(model, 4, (2, 9, 11))
    assert next(iter(plan.timings)).endswith("parts by torch")
    assert list(plan.timings.values()) == sorted(plan.timings.values())
    assert [(part.engine, part.torch) for part in plan.left_to_torch] == [(2.0, 1.0)] * len(plan.left_to_torch)
    assert plan.fallbacks == ()
    assert_near(plan(x), model(x))
    monkeypatch.setattr(arrange, "_RIVAL", 0.0)
    plan = accelerate(model, 4, (2, 9, 11))
    assert next(iter(plan.timings)) == "torch"
    (part,) = plan.left_to_torch
    assert (part.first, part.last, part.engine, part.torch) == ("0.conv", "4.2", 2.0, 1.0)


@torch.no_grad()
def test_nothing_for_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrange, "_LONG", 0.0)
    torch.manual_seed(0)
    model, x = nn.ConvTranspose2d(3, 4, 4, 2).eval(), torch.rand(2, 3, 5, 5)
    plan = accelerate(model, 2, (3, 5, 5))
    assert plan.left_to_torch == ()
    assert_near(plan(x), model(x))
