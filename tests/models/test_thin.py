"""Thinned networks cost what they should, and are the baseline where they need not be thinner."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from tkn import build_model, count_macs
from tkn.bench.tc_resnet import TcResNet8
from tkn.models.thin import thin


@pytest.mark.parametrize(("name", "size"), [("cnn6", 12), ("dn10", 12), ("dn40", 8), ("stn", 16)])
@pytest.mark.parametrize("share", [0.2, 0.55])
def test_the_cost_is_met(name: str, size: int, share: float) -> None:
    baseline = build_model(name, (3, size, size), 10)
    wanted = int(share * count_macs(baseline, (3, size, size)).total_dense)
    thinned = thin(baseline, (3, size, size), wanted)
    report = count_macs(thinned, (3, size, size))
    assert report.total_dense == pytest.approx(wanted, rel=0.04)
    assert not report.unknown
    assert thinned(torch.zeros(2, 3, size, size)).shape == (2, 10)


def test_the_cost_of_one_dimension_is_met() -> None:
    baseline, size = TcResNet8(8, 4).eval(), (8, 33)
    wanted = int(0.3 * count_macs(baseline, size).total_dense)
    thinned = thin(baseline, size, wanted).eval()
    assert count_macs(thinned, size).total_dense == pytest.approx(wanted, rel=0.1)
    assert thinned(torch.zeros(2, *size)).shape == (2, 4)


def test_the_whole_cost_is_the_baseline() -> None:
    baseline = build_model("dn10", (1, 8, 8), 10)
    thinned = thin(baseline, (1, 8, 8), count_macs(baseline, (1, 8, 8)).total_dense)
    shapes = [(name, value.shape) for name, value in baseline.state_dict().items()]
    assert [(name, value.shape) for name, value in thinned.state_dict().items()] == shapes


def test_widths_are_multiples() -> None:
    baseline = build_model("cnn6", (1, 12, 12), 10)
    thinned = thin(baseline, (1, 12, 12), count_macs(baseline, (1, 12, 12)).total_dense // 5, multiple=16)
    widths = [module.out_channels for module in thinned.modules() if isinstance(module, nn.Conv2d)]
    assert widths
    assert all(width % 16 == 0 for width in widths)


def test_the_least_is_one_kernel_each() -> None:
    thinned = thin(build_model("dn10", (1, 8, 8), 10), (1, 8, 8), 1)
    assert {module.out_channels for module in thinned.modules() if isinstance(module, nn.Conv2d)} == {1}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "regnet_y_400mf", "squeezenet1_1", "densenet121"])
def test_networks_with_sums_groups_and_gates(name: str) -> None:
    """Of torchvision: maps that are summed or multiplied stay of one width, groups keep their widths."""
    baseline, size = get_model(name, weights=None, num_classes=10).eval(), (3, 64, 64)
    wanted = int(0.4 * count_macs(baseline, size).total_dense)
    thinned = thin(baseline, size, wanted).eval()
    assert count_macs(thinned, size).total_dense == pytest.approx(wanted, rel=0.1)
    assert thinned(torch.zeros(2, *size)).shape == (2, 10)
    pairs = zip(baseline.modules(), thinned.modules(), strict=True)
    for old, new in pairs:
        if isinstance(old, nn.Conv2d) and old.groups > 1:
            assert new.out_channels // new.groups == old.out_channels // old.groups


@pytest.mark.parametrize(("name", "kind"), [("convnext_tiny", "ConvNeXt"), ("shufflenet_v2_x0_5", "ShuffleNetV2")])
def test_a_network_that_needs_its_widths_is_refused(name: str, kind: str) -> None:
    model = get_model(name, weights=None, num_classes=10).eval()
    with pytest.raises(ValueError, match=f"{kind} can't be thinned: "):
        thin(model, (3, 32, 32), 10**6)


class OneSum(nn.Module):
    """Its only convolution can't become thinner."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


def test_nothing_to_thin_is_refused() -> None:
    with pytest.raises(ValueError, match="OneSum can't be thinned: "):
        thin(OneSum(), (3, 8, 8), 100)
