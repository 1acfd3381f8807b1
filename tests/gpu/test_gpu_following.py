"""Lists that follow moving ROIs: exact within their bounds, noticed when ROIs leave these, made anew in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_cases import assert_near, results, truth
from torch import Tensor, nn

from tkn import TargetConv2d, moving, windows
from tkn.backends.cuda import backend
from tkn.geometry import Pool
from tkn.moving import NotPrepared, recording
from tkn.ops.following import Following
from tkn.sequential import TargetSequential
from tkn.training import cuda_graphs
from tkn.training.cuda_graphs import StepGraphs

SIZE = (8, 8)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(windows, "is_far", lambda _: True)
    yield
    moving._known.clear()


@pytest.fixture
def network(device: torch.device) -> TargetSequential:
    torch.manual_seed(0)
    made = TargetSequential(
        TargetConv2d(1, 3, 3, padding=1, engine="roi"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        TargetConv2d(3, 2, 3, padding=1, engine="roi"),
    )
    with torch.no_grad():
        for layer, scale in ((made[0], 0.4), (made[3], 0.9)):
            layer.loc.fill_(0.5)
            layer.scale.fill_(scale)
    return made.to(device)


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(0)).to(device)


def move(network: nn.Module, by: float) -> None:
    with torch.no_grad():
        network[0].loc.add_(by)


def test_bounds_hold_for_a_while(network: TargetSequential, x: Tensor) -> None:
    network(x)
    lists = dict(backend._stages._values)
    before = moving.remade_count()
    move(network, 0.5 / SIZE[0])  # half a pixel: within the margin
    assert_near(network(x), truth(network)(x.double()))
    assert dict(backend._stages._values) == lists
    move(network, 2 / SIZE[0])
    assert_near(network(x), truth(network)(x.double()))
    assert moving.remade_count() == before + 1
    assert len(backend._stages._values) > len(lists)


def test_rois_that_shrink_get_smaller_lists(network: TargetSequential, x: Tensor) -> None:
    network(x)
    before = moving.remade_count()
    with torch.no_grad():
        network[0].scale.mul_(0.5)
    assert_near(network(x), truth(network)(x.double()))
    assert moving.remade_count() == before + 1


def test_a_change_that_torch_does_not_count_is_seen(network: TargetSequential, x: Tensor) -> None:
    network(x)
    version = network[0].loc._version
    network[0].loc.data.add_(0.3)
    assert network[0].loc._version == version
    assert_near(network(x), truth(network)(x.double()))


def captured(network: TargetSequential, x: Tensor, following: Following) -> Any:
    """The chain of layers as a graph of kernels has it: with the lists as they were then."""
    with following.recording():
        targets = [network[0].target(relu=True, pool=Pool((2, 2))), network[3].target()]
        return backend.chain(tuple(x.shape), x.dtype, targets, x.dtype)


def test_what_was_captured_follows(network: TargetSequential, x: Tensor) -> None:
    following = Following()
    with pytest.raises(NotPrepared):
        captured(network, x, following)
    results(network, x)
    chain = captured(network, x, following)
    following.check()
    assert not following.left()
    move(network, 0.5 / SIZE[0])
    following.check()
    assert not following.left()
    assert_near(chain.infer(x), truth(network)(x.double()))
    move(network, -2 / SIZE[0])
    following.check()
    assert following.left()
    assert difference_of(chain, network, x) > 1e-3
    addresses = [tensor.data_ptr() for stage in chain.stages for tensor in stage._tensors()]
    assert following.remake()
    assert not following.left()
    assert [tensor.data_ptr() for stage in chain.stages for tensor in stage._tensors()] == addresses
    y, saved = chain.forward(x)
    assert_near(y, truth(network)(x.double()))
    expected = truth(network)
    expected(x.double()).sum().backward()
    found = chain.backward(torch.ones_like(y), x, saved, [True] * 9)
    for one, parameter in zip(found[1:], expected.parameters(), strict=True):
        assert_near(one, parameter.grad)
    # Others ask for these lists too.
    lists = len(backend._stages._values)
    assert_near(network(x), truth(network)(x.double()))
    assert len(backend._stages._values) == lists


def difference_of(chain: Any, network: TargetSequential, x: Tensor) -> float:
    return float((chain.infer(x) - truth(network)(x.double())).detach().abs().max())


def test_what_has_no_place_is_captured_anew(network: TargetSequential, x: Tensor) -> None:
    with torch.no_grad():
        network[0].scale.fill_(0.15)
    following = Following()
    results(network, x)
    captured(network, x, following)
    with torch.no_grad():
        network[0].scale.fill_(1.0)
        network[0].loc.fill_(0.5)
    following.check()
    assert following.left()
    assert not following.remake()
    assert_near(network(x), truth(network)(x.double()))


def test_steps_of_graphs_are_exact_while_rois_move(
    network: TargetSequential, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph computes with the lists that it was captured with, whatever the ROIs are."""

    class CalledAgain:
        def __init__(self, function: Any) -> None:
            self.record = moving.record_here()
            self.function = function
            function()

        def replay(self) -> Any:
            if self.record is None:
                return self.function()
            with recording(self.record):
                return self.function()

    monkeypatch.setattr(cuda_graphs, "Captured", CalledAgain)
    monkeypatch.setattr(cuda_graphs, "_FIRST_STEPS", 1)
    monkeypatch.setattr(backend, "_HEADROOM", 3.0)

    def losses(x: Tensor, _targets: Tensor, penalised: bool) -> dict[str, Tensor]:
        assert not penalised
        return {"total": network(x).square().sum()}

    graphs = StepGraphs(losses, lambda: None, network.parameters())
    replayed = []
    for step in range(8):
        found = graphs.step((x, x), False)
        replayed.append(found is not None)
        if found is None:
            network.zero_grad()
            losses(x, x, False)["total"].backward()
        expected = truth(network)
        expected(x.double()).square().sum().backward()
        for one, other in zip(network.parameters(), expected.parameters(), strict=True):
            assert_near(one.grad, other.grad)
        move(network, 1.2 / SIZE[0] if step % 3 == 2 else 0.05 / SIZE[0])
        graphs.project(captured=found is not None)
    assert replayed == [False, *[True] * 7]
