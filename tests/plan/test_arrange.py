"""Which way a plan computes: the fastest of the engine's and torch's, all of them right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_cases import assert_near
from plan_networks import NETWORKS, images, network

from tkn import accelerate
from tkn.plan import arrange
from tkn.plan.capture import build_graph, frozen
from tkn.plan.folded import FoldedConvolve, folded
from tkn.plan.graph import Affine, Call
from tkn.plan.nonlinearity import Nonlinearity, Relu
from tkn.plan.parts import Program


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_folding_changes_no_result(name: str, channels_last: bool) -> None:
    model = network(name)
    graph = build_graph(frozen(model), NETWORKS[name][1])
    for batch in (1, 3):
        x = images(name, batch)
        kept = x.clone()
        assert_near(Program.by_torch(folded(graph, channels_last=channels_last))(x), model(x))
        assert torch.equal(x, kept)


def test_what_follows_a_convolution_is_folded() -> None:
    graph = folded(build_graph(frozen(network("plain")), NETWORKS["plain"][1]), channels_last=True)
    folds = [n.operation.function for n in graph.nodes if isinstance(n.operation, Call)]
    assert [fold.function == Relu() for fold in folds if isinstance(fold, FoldedConvolve)] == [True, True, True, False]
    assert sum(isinstance(node.operation, Affine) for node in graph.nodes) == 1  # after a ReLU
    assert not any(isinstance(node.operation, Nonlinearity) for node in graph.nodes)


@torch.no_grad()
def test_what_is_outside_of_rois_is_not_multiplied_by_torch_either() -> None:
    """Infinite results outside of the ROIs do not become NaN."""
    model = network("plain")
    graph = build_graph(frozen(model), NETWORKS["plain"][1])
    x = images("plain", 2)
    x[:, :, 0, 0] = torch.inf
    first = next(n for n in graph.nodes if n.name == "0")
    assert not first.operation.mask[:, 0, 0].all()  # type: ignore[union-attr]
    expected, got = (Program.by_torch(g)(x).isnan() for g in (graph, folded(graph, channels_last=False)))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("fastest", ["torch", "torch, channels last", "vectors over one image"])
def test_the_fastest_way_is_taken(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(run: Callable[[], object], best: float) -> float:
        assert best > 0
        run()
        way = getattr(run.func, "way", "a part")  # type: ignore[attr-defined]
        return 1.0 if way == fastest else 2.0

    monkeypatch.setattr(arrange, "_seconds", seconds)
    model, x = network("plain"), images("plain", 4)
    plan = accelerate(model, 4, NETWORKS["plain"][1])
    assert next(iter(plan.timings)) == fastest
    assert {"torch", "torch, channels last", "vectors over one image"} < set(plan.timings)
    assert sorted(plan.timings.values()) == list(plan.timings.values())
    with torch.no_grad():
        assert_near(plan(x), model(x))


def test_a_wrong_folding_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FoldedConvolve.__call__
    monkeypatch.setattr(FoldedConvolve, "__call__", lambda self, x: 2 * right(self, x))
    graph = build_graph(frozen(network("plain")), NETWORKS["plain"][1])
    (program,) = arrange._by_torch(graph, arrange._Whole(graph))
    assert not any(isinstance(n.operation, Call) for n in program.graph.nodes)


def test_hopeless_ways_are_timed_once_more_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrange, "_SECONDS", 0)
    calls: list[int] = []
    assert arrange._seconds(lambda: calls.append(0), best=0.0) > 0
    assert len(calls) == 2
    arrange._seconds(lambda: calls.append(0), best=torch.inf)
    assert len(calls) == 5
