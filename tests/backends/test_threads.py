"""Threads change nothing, to the bit, as long as the tiles are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from engine_cases import results, targeted
from plan_networks import NETWORKS, images, network, plan_of
from torch import Tensor, nn

from tkn import TargetConv2d
from tkn.sequential import TargetSequential


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def with_threads(compute: Callable[[], list[Tensor]]) -> None:
    torch.set_num_threads(1)
    alone = compute()
    torch.set_num_threads(2)
    for _ in range(3):
        for one, other in zip(alone, compute(), strict=True):
            assert torch.equal(one, other)


# Between, one thread takes larger tiles than two.
@pytest.mark.parametrize("batch", [1, 5, 8, 128])
@pytest.mark.parametrize("inputs", [2, 18])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients(batch: int, inputs: int, autocast: bool) -> None:
    torch.manual_seed(0)
    chain = TargetSequential(
        TargetConv2d(inputs, 40, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), TargetConv2d(40, 6, 3, padding=1), nn.ReLU()
    )
    targeted(chain, seed=1, engine="roi")
    x = torch.randn(batch, inputs, 9, 8)

    def compute() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return results(chain, x)

    with_threads(compute)


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize(
    ("name", "batch"),
    [
        *(("plain", batch) for batch in (1, 5, 32, 70)),
        *(("concatenating", batch) for batch in (1, 5, 32, 70)),
        *(("tdn10", 40), ("wide", 40)),
    ],
)
def test_plans(name: str, batch: int, small: bool) -> None:
    """Of one plan, and of plans made for as many threads."""
    model, x = network(name), images(name, batch)
    size = NETWORKS[name][1]
    plan = plan_of(model, size, min(batch, 16) if small else batch, small=small)
    with_threads(lambda: [plan(x)])
    with_threads(lambda: [plan_of(model, size, min(batch, 16) if small else batch, small=small)(x)])


def test_many_inputs_are_summed_in_one_order() -> None:
    """Where what a pixel reads does not fit into a cache."""
    torch.manual_seed(0)
    layer = targeted(TargetConv2d(200, 4, 5, padding=2, engine="roi"), seed=1)
    x = torch.randn(8, 200, 6, 6)
    with_threads(lambda: [layer(x).detach()])
