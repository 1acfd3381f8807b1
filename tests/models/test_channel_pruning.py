"""Channel pruning meets its budget, and what is left can be made again without the library."""

from __future__ import annotations

import sys

import pytest
import torch

from tkn import build_model, count_macs
from tkn.models import Architecture
from tkn.models.narrow import pruned_network
from tkn.models.small_cnn import small_cnn

pytest.importorskip("torch_pruning")
FLAT = {"attention": "cauchy", "scale_unit": 0.5, "min_size": 3}


@pytest.mark.parametrize(
    ("name", "size", "options", "macs"),
    [
        ("dn10", (1, 28, 28), {}, 6_000_000),
        ("stn", (3, 16, 16), {}, 9_000_000),
        ("torchvision", (3, 32, 32), {"network": "resnet18"}, 15_000_000),
    ],
)
def test_the_budget_is_met(
    name: str, size: tuple[int, int, int], options: dict[str, str], macs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    trained = build_model(name, size, 10, **options)
    pruned, architecture = pruned_network(Architecture(name, size, 10, options, FLAT), trained.state_dict(), macs)
    assert pruned.training
    assert count_macs(pruned, size).total_dense == pytest.approx(macs, rel=0.02)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    again = Architecture.from_dict(architecture.to_dict()).build()
    again.load_state_dict(pruned.state_dict())
    x = torch.rand(2, *size)
    assert torch.equal(again.eval()(x), pruned.eval()(x))


def test_the_channels_that_stay_keep_their_weights() -> None:
    torch.manual_seed(0)
    architecture = Architecture("cnn6", (1, 8, 8), 3, {}, FLAT)
    trained = architecture.build()
    with torch.no_grad():
        trained[0].weight[::2] *= 1e-4
    pruned, _ = pruned_network(architecture, trained.state_dict(), 12_000_000)
    kept = pruned[0].weight
    assert len(kept) < 256
    assert all(any(torch.equal(row, other) for other in trained[0].weight[1::2]) for row in kept)


def test_a_small_network_comes_as_near_as_whole_channels_allow() -> None:
    torch.manual_seed(0)
    size = (1, 16, 16)
    architecture = Architecture("python", size, 2, {"factory": "tkn.models.small_cnn:small_cnn"}, FLAT)
    trained = architecture.build(factory=small_cnn)
    wanted = 0.3333 * count_macs(trained, size).total_dense
    pruned, described = pruned_network(architecture, trained.state_dict(), 0.3333, small_cnn)
    assert described.narrowed is not None
    assert described.narrowed.macs == count_macs(pruned, size).total_dense == pytest.approx(wanted, rel=0.1)


def test_impossible_budgets() -> None:
    architecture = Architecture("dn10", (1, 8, 8), 3, {}, FLAT)
    weights = architecture.build().state_dict()
    with pytest.raises(ValueError, match=r"channels\.macs=1: the least that pruning comes to is \d+$"):
        pruned_network(architecture, weights, 1)
    with pytest.raises(ValueError, match=r"channels\.macs=1000000000 must lie between 0 and \d+, those of the whole"):
        pruned_network(architecture, weights, 10**9)
