"""Whole networks by the GPU's kernels: a graph lowered to rows computes what the network does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_cases import assert_near, targeted
from torch import Tensor, nn
from torch.nn import functional as F

from tkn import TargetConv2d, accelerate, load_plan
from tkn.backends.cuda import backend
from tkn.plan.gpu import GpuPart, _Run
from tkn.plan.graph import Size
from tkn.plan.plan import Plan


class Residual(nn.Module):
    """Sums of normalised maps, a mean over all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = TargetConv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second, self.second_norm = TargetConv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        y = F.relu(y + self.second_norm(self.second(y)))
        return self.linear(y.mean((2, 3)))


class Concatenating(nn.Module):
    """Normalised before each convolution, as DenseNets; poolings that overlap and that follow a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.second, self.second_norm = TargetConv2d(2, 2, 3, padding=1), nn.BatchNorm2d(4)
        self.narrow, self.linear = TargetConv2d(4, 3, 1), nn.Linear(27, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.cat((x, self.second(F.relu(self.norm(x)))), 1)
        x = F.avg_pool2d(self.narrow(F.relu(self.second_norm(x))), 2)
        return self.linear(F.max_pool2d(x, 3, 1, 1).flatten(1))


def plain() -> nn.Module:
    layers = (TargetConv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), TargetConv2d(3, 4, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 2))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Size]] = {
    "plain": (plain, (1, 6, 7)),
    "residual": (Residual, (2, 5, 5)),
    "concatenating": (Concatenating, (1, 6, 6)),
}


def made(name: str) -> tuple[nn.Module, Size]:
    """With ROIs, and outputs that depend on all of the network."""
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    network = targeted(make(), seed=1).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(4)
    return network, size


def by_kernels(plan: Plan) -> bool:
    assert plan._program is not None
    return any(isinstance(part, GpuPart) for part in plan._program.parts)


@pytest.mark.parametrize("name", NETWORKS)
def test_plans_compute_what_networks_do(name: str, device: torch.device, tmp_path: Path) -> None:
    network, size = made(name)
    plan = accelerate(network, 3, size, device=device)
    assert by_kernels(plan)
    x = torch.randn(4, *size)  # more than the plan is made for
    with torch.no_grad():
        expected = network(x)
        assert expected.std(dim=0).min() > 1e-4
    result = plan(x.to(device))
    assert result.device.type == device.type
    assert_near(result.cpu(), expected)
    plan.save(tmp_path / "net.plan")
    again = load_plan(tmp_path / "net.plan", device=device)
    assert_near(again(x.to(device)).cpu(), expected)
    assert by_kernels(again)


def test_halves(device: torch.device) -> None:
    """From images of either type; a network on the device, made at the first batch; torch's way in the same type."""
    network, size = made("plain")
    plan = accelerate(network.to(device), 3, dtype=torch.float16, device=device)
    x = torch.randn(3, *size, device=device)
    with torch.no_grad():
        expected = network(x)
    for images in (x, x.half(), x.contiguous(memory_format=torch.channels_last)):
        result = plan(images)
        assert result.dtype == plan.dtype == torch.float16
        assert_near(result.float(), expected, tolerance=1e-2)
    assert by_kernels(plan)
    assert plan._by_torch is not None
    assert_near(plan._by_torch(x.half()).float(), expected, tolerance=1e-2)
    copied = copy.deepcopy(plan)
    assert torch.equal(copied(x), plan(x))


class Mixed(nn.Module):
    """Layers that only torch computes between those of the kernels, one of them without a part of its own in files."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = TargetConv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.norm(self.first(x))))


def test_layers_that_torch_computes(device: torch.device) -> None:
    torch.manual_seed(0)
    network = targeted(Mixed(), seed=1).eval()
    plan = accelerate(network, 2, (2, 5, 5), device=device)
    assert "norm (GroupNorm)" in plan.fallbacks
    assert device.type == "cpu" or "gelu (gelu)" in plan.fallbacks
    assert by_kernels(plan)
    x = torch.randn(3, 2, 5, 5)
    with torch.no_grad():
        assert_near(plan(x.to(device)).cpu(), network(x))


def test_without_kernels_torch_computes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    network, size = made("plain")
    monkeypatch.setattr(backend, "available", lambda *_, **__: False)
    plan = accelerate(network, 3, size, device=device)
    assert not by_kernels(plan)
    x = torch.randn(3, *size)
    with torch.no_grad():
        assert_near(plan(x.to(device)).cpu(), network(x))


def test_wrong_kernels_are_not_used(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    network, size = made("plain")
    monkeypatch.setattr(_Run, "__call__", lambda *_: None)
    with pytest.warns(UserWarning, match="torch runs the plan: the GPU engine's result differs"):
        plan = accelerate(network, 3, size, device=device)
    assert not by_kernels(plan)
