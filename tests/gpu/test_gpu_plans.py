"""Whole networks by the GPU's kernels: a graph lowered to rows computes what the network does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_cases import assert_near, targeted
from torch import Tensor, nn
from torch.nn import functional as F

from tkn import TargetConv2d
from tkn.plan.capture import build_graph, frozen
from tkn.plan.gpu import GpuPart, arranged_on_gpu
from tkn.plan.graph import Size


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


@pytest.mark.parametrize("name", NETWORKS)
def test_plans_compute_what_networks_do(name: str, device: torch.device) -> None:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    network = targeted(make(), seed=1).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(4)
    program = arranged_on_gpu(build_graph(frozen(network), size), 3, device, torch.float32)
    assert isinstance(program.parts[0], GpuPart)
    x = torch.randn(4, *size)  # more than the plan is made for
    with torch.no_grad():
        expected = network(x)
        assert expected.std(dim=0).min() > 1e-4
        assert_near(program(x.to(device)).cpu(), expected)
