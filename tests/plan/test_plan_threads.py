"""Threads change nothing in a plan's results, to the bit, as long as the tiles are the same."""

from __future__ import annotations

import pytest
from engine_cases import same_with_threads
from plan_networks import NETWORKS, images, network, plan_of


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
    same_with_threads(lambda: [plan(x)])
    same_with_threads(lambda: [plan_of(model, size, min(batch, 16) if small else batch, small=small)(x)])
