"""A budget of multiply-adds, and the count that it goes by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tkn import (
    AttentiveRegularization2d,
    Budget,
    TargetConv1d,
    TargetConv2d,
    TargetConv3d,
    build_model,
    count_macs,
    targetize,
)
from tkn.layers import roi_layers
from tkn.roi_count import RoiCount

SIZE = (1, 28, 28)


class Mixed(nn.Module):
    """Layers of one, two and three dimensions, one of them run twice on maps of different sizes, and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.line = TargetConv1d(2, 4, 3, padding=1, min_size=2)
        self.plane = TargetConv2d(4, 4, 3, padding=1, groups=2)
        self.weighed = AttentiveRegularization2d(4)
        self.solid = TargetConv3d(4, 5, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x.flatten(2))[..., None].expand(-1, -1, -1, 9)
        y = self.plane(F.max_pool2d(self.plane(y), 2))
        return self.solid(self.weighed(y)[..., None].expand(-1, -1, -1, -1, 7))


def _scatter(model: nn.Module) -> None:
    """Give every kernel a ROI of its own, some of them beyond the border."""
    with torch.no_grad():
        for layer in roi_layers(model).values():
            layer.loc.uniform_(-0.1, 1.1)
            layer.scale.uniform_(0.05, 1.0)


def _train(model: nn.Module, budget: Budget, optimizer: torch.optim.Optimizer, steps: int, batch: int = 4) -> None:
    for step in range(steps):
        torch.manual_seed(100 + step)
        loss = F.cross_entropy(model(torch.rand(batch, *SIZE)), torch.randint(10, (batch,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("make", "size"), [(lambda: build_model("tdn10", SIZE, 10), SIZE), (Mixed, (2, 4, 5))], ids=["tdn10", "mixed"]
)
def test_the_count_is_that_of_count_macs(
    make: Callable[[], nn.Module], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    model = make().to(dtype)
    count = RoiCount(model, size)
    report = count_macs(model, size)
    assert (count.dense, count.most, count.now) == (report.total_dense, report.total_dense, report.total_roi)
    for seed in range(5):
        torch.manual_seed(seed)
        _scatter(model)
        assert count.fixed + count.macs(count.loc(), count.scale()).sum() == count_macs(model, size).total_roi
    # Several at once.
    both = count.macs(torch.stack([count.loc()] * 2), torch.stack([count.scale(), torch.ones_like(count.scale())]))
    assert torch.equal(both[0], count.macs(count.loc(), count.scale()))


def test_projection_and_the_least() -> None:
    torch.manual_seed(0)
    model = build_model("tkn6", SIZE, 10)
    _scatter(model)
    count = RoiCount(model, SIZE)
    loc, scale = count.projected(count.loc(), count.scale())
    for name, layer in roi_layers(model).items():
        layer.project_({row.name: row.map_size for row in count_macs(model, SIZE).target_layers}[name])
    torch.testing.assert_close(loc, count.loc())
    torch.testing.assert_close(scale, count.scale())
    smallest = count.projected(count.loc(), torch.zeros_like(scale))
    assert count.fixed + count.macs(*smallest).sum() == count.least


@pytest.mark.parametrize(
    ("name", "share", "optimizer", "batch"),
    [
        ("tdn10", 0.5, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 4),
        ("tdn10", 0.35, lambda p: torch.optim.Adam(p, 1e-3), 4),
        ("tdn10", 0.35, lambda p: torch.optim.SGD(p, 1e-6), 2),  # so that the optimiser moves no scale
        ("tdn10", 0.35, lambda p: torch.optim.Adam(p, 0.3), 2),  # and here wildly
        ("all of dn10", 0.15, lambda p: torch.optim.SGD(p, 0.1), 4),
        ("tkn6", 0.1, lambda p: torch.optim.RMSprop(p, 1e-5), 2),
    ],
)
def test_a_budget_is_met_and_held(
    name: str, share: float, optimizer: Callable[[Any], torch.optim.Optimizer], batch: int
) -> None:
    torch.manual_seed(0)
    model = targetize(build_model("dn10", SIZE, 10), "all") if name == "all of dn10" else build_model(name, SIZE, 10)
    budget = Budget(model, SIZE, share=share, steps=5)
    chosen = optimizer(model.parameters())
    for done in range(1, 8):
        _train(model, budget, chosen, 1, batch)
        report = count_macs(model, SIZE)
        planned = budget.planned()
        assert budget.met == (done >= 5)
        assert (planned == budget.macs) == budget.met
        assert 0.99 * planned <= report.total_roi <= planned
    before = copy.deepcopy(model.state_dict())
    _train(model, budget, chosen, 1, batch)
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert moved
    assert not [key for key in moved if key.endswith(("loc", "scale"))]


def test_the_least_can_be_met() -> None:
    """Also without gradients, when all ROIs of a layer are the same and would jump together."""
    model = build_model("tdn10", SIZE, 10)
    least = RoiCount(model, SIZE).least
    for macs in (1.3 * least, least):
        budget = Budget(model, SIZE, macs=macs, steps=3)
        for _ in range(3):
            budget.step()
        assert 0.999 * macs <= count_macs(model, SIZE).total_roi <= macs


class Needed(nn.Module):
    """Four kernels of which the output needs the first two, of the whole map, and the others hardly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = TargetConv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) * torch.tensor([1.0, 1.0, 1e-3, 1e-3])[:, None, None]).mean((2, 3)).sum(1)


def test_kernels_that_the_loss_needs_stay_large() -> None:
    torch.manual_seed(0)
    model = Needed()
    nn.init.constant_(model.conv.weight, 0.1)
    budget = Budget(model, SIZE, share=0.3, steps=30)
    for _ in range(30):
        model.zero_grad()
        (model(torch.rand(4, *SIZE)) - 1).square().sum().backward()
        budget.step()
    macs = budget.count.macs(budget.count.loc(), budget.count.scale())
    assert macs.sum() <= 0.3 * count_macs(model, SIZE).total_dense
    assert macs[:2].min() > 10 * macs[2:].max()


def test_a_continued_budget_is_an_uninterrupted_one() -> None:
    def begin() -> tuple[nn.Module, Budget, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = build_model("tdn10", SIZE, 10)
        return model, Budget(model, SIZE, macs=4.5e6, steps=4), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    for steps in (2, 5):
        parts, whole = begin(), begin()
        _train(*parts, steps)
        saved = [copy.deepcopy(part.state_dict()) for part in parts]
        continued = begin()
        for part, state in zip(continued, saved, strict=True):
            part.load_state_dict(state)
        # The same batches again.
        _train(*parts, 3)
        _train(*continued, 3)
        _train(*whole, steps)
        _train(*whole, 3)
        for other in (continued, whole):
            for name, value in other[0].state_dict().items():
                assert torch.equal(value, parts[0].state_dict()[name]), name
    with pytest.raises(ValueError, match="is the state of a budget of 4500000 multiply-adds, not of 4600000"):
        Budget(parts[0], SIZE, macs=4.6e6).load_state_dict(saved[1])
    for wrong in ({"macs": 4.5e6}, {**saved[1], "loc": torch.zeros(2, 3)}):
        with pytest.raises(ValueError, match="not the state of a budget of such a network"):
            parts[1].load_state_dict(wrong)


class NoLook(TorchDispatchMode):
    """Fails where the host would wait for numbers of a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_a_gpu() -> None:
    model = Mixed()
    budget = Budget(model, (2, 4, 5), share=0.9, steps=1)
    for _ in range(2):
        model(torch.rand(1, 2, 4, 5)).sum().backward()
        with NoLook():
            budget.step()
    assert budget.held


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"share": 0.3},
            r"share=0\.3 of 11317030 .* the least is 3439942 \(share 0\.304\). 3125014 of these .*'all'.*min_size",
        ),
        ({"macs": 3e6}, r"macs=3e\+06 .* less than the chosen layers can reach: the least is 3439942"),
        ({"share": 1.1}, r"share=1\.1 is more than the 11317030 multiply-adds of ROIs that are whole maps"),
        ({"macs": 2e7}, r"macs=2e\+07 is more than"),
        ({"share": 0.5, "steps": 0}, "steps=0 must be at least 1"),
        ({}, "either a share or macs, not share=None and macs=None"),
        ({"share": 0.5, "macs": 5e6}, r"either a share or macs, not share=0\.5 and macs=5000000"),
    ],
)
def test_impossible_budgets(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(build_model("tdn10", SIZE, 10), SIZE, **options)


def test_frozen_rois_stay_and_count_as_they_are() -> None:
    torch.manual_seed(0)
    model = build_model("tdn10", SIZE, 10)
    first, *others = roi_layers(model).values()
    with torch.no_grad():
        first.scale.fill_(0.6)
    first.loc.requires_grad_(False)
    first.scale.requires_grad_(False)
    budget = Budget(model, SIZE, share=0.5, steps=4)
    _train(model, budget, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1), 6)
    assert 0.98 * budget.macs <= count_macs(model, SIZE).total_roi <= budget.macs
    assert (first.scale == 0.6).all()
    assert all((layer.scale < 1).any() for layer in others)


def test_a_dense_network_has_nothing_to_shrink() -> None:
    with pytest.raises(ValueError, match="the network has no target layers"):
        Budget(build_model("dn10", SIZE, 10), SIZE, share=0.5)
