"""Maps of other sizes: upsampling, uneven and adaptive pooling, in all arrangements, against float64."""

from __future__ import annotations

from random import Random

import pytest
import torch
from engine_cases import assert_near, place_rois, targeted
from plan_networks import agree, plan_of
from torch import Tensor, nn
from torch.nn import functional as F

from tkn import TargetConv2d
from tkn.plan.graph import AdaptivePooling, Resize, UnevenMean
from tkn.plan.resampling import axes, resample, windows


def random_resizing(chosen: Random, side: int) -> nn.Module:
    kind = chosen.choice(("nearest", "bilinear", "bilinear", "mean", "mean", "adaptive mean", "adaptive maximum"))
    if kind in ("nearest", "bilinear"):
        corners = None if kind == "nearest" else chosen.random() < 0.5
        if chosen.random() < 0.5:
            sides = chosen.randint(1, 2 * side + 1), chosen.randint(1, 2 * side + 1)
            return nn.Upsample(size=sides, mode=kind, align_corners=corners)
        factor = chosen.choice((2, 1.5, (2.3, 0.7), 0.5, 3))
        again = chosen.choice((None, True))
        return nn.Upsample(scale_factor=factor, mode=kind, align_corners=corners, recompute_scale_factor=again)
    if kind == "mean":
        kernel = chosen.randint(2, 4)
        return nn.AvgPool2d(
            *(kernel, chosen.randint(1, 4), chosen.randint(0, kernel // 2)),
            ceil_mode=chosen.random() < 0.6,
            count_include_pad=chosen.random() < 0.5,
            divisor_override=chosen.choice((None, None, 3)),
        )
    sides = chosen.randint(1, 9), chosen.randint(1, 9)
    return nn.AdaptiveAvgPool2d(sides) if kind == "adaptive mean" else nn.AdaptiveMaxPool2d(sides)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.compact
@torch.no_grad()
def test_random_resizing(seed: int) -> None:
    chosen = Random(seed)
    torch.manual_seed(seed)
    width, channels = chosen.choice((6, 9, 19, 35)), chosen.choice((3, 12, 18))
    layers: list[nn.Module] = [TargetConv2d(3, channels, 3, padding=1)]
    if chosen.random() < 0.6:
        layers.append(nn.BatchNorm2d(channels))
    if chosen.random() < 0.4:
        layers.append(nn.SiLU())
    layers += [
        random_resizing(chosen, width),
        TargetConv2d(channels, channels, 3, padding=1, groups=chosen.choice((1, channels))),
    ]
    model = targeted(nn.Sequential(*layers), seed=seed).eval()
    if seed % 3 == 0:
        place_rois(model[0], ("pixel", "border", "edge")[seed % 2], (width - 1, width), seed)
    agree(model, (3, width - 1, width), (1, 1 + seed % 17), batch=1 + seed % 17)


class Decoder(nn.Module):
    """As networks for segmentation have them: a smaller map made as large as another, beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = TargetConv2d(3, 10, 3, padding=1), TargetConv2d(10, 12, 3, stride=2, padding=1)
        self.last, self.up = TargetConv2d(22, 8, 3, padding=1), nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.first(x))
        b = self.last(torch.cat((a, self.up(torch.relu(self.second(a)))), 1))
        return F.interpolate(b, size=x.shape[-2:], mode="bilinear", align_corners=False) + F.interpolate(
            F.max_pool2d(b, 2), size=(b.size(2), b.shape[3]), mode="area"
        )


@pytest.mark.parametrize("width", [8, 40])
@torch.no_grad()
def test_decoders(width: int) -> None:
    torch.manual_seed(0)
    agree(targeted(Decoder(), seed=1).eval(), (3, 8, width), (1, 5))


@pytest.mark.parametrize("inputs", [1, 2, 7])
@pytest.mark.parametrize("outputs", [1, 3, 7, 16])
def test_weights_are_torchs(inputs: int, outputs: int) -> None:
    """And taps never leave the map."""
    size, result = (inputs, 2 * inputs), (outputs, inputs)
    x = torch.randn(1, 1, *size, dtype=torch.float64)
    operations = [
        *(Resize(result, True, corners) for corners in (False, True)),
        *(Resize(result, False), AdaptivePooling(result, average=True)),
        *(Resize((2 * inputs, 3 * inputs), bilinear, False, (2.0, 1.5)) for bilinear in (False, True)),
    ]
    for operation in operations:
        lines, columns = axes(operation, size)
        for axis, side in zip((lines, columns), size, strict=True):
            assert axis.first.min() >= 0
            assert (axis.first + axis.weight.shape[1]).max() <= side
        pixel, weight = windows(lines, columns, size[1])
        ours = (x.flatten()[torch.from_numpy(pixel)] * torch.from_numpy(weight)).sum(dim=1)
        expected = resample(operation, x.float() if operation == Resize(result, False) else x)
        assert_near(ours, expected.flatten(), 1e-6)


@torch.no_grad()
def test_numbers_that_are_not_finite() -> None:
    """They come out where torch's do."""
    torch.manual_seed(0)
    for resizing in (nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(4)):
        model = nn.Sequential(nn.Conv2d(2, 18, 1), resizing).eval()
        x = torch.randn(2, 2, 8, 20)
        x[0, 0, 3, 11], x[1, 1, 7, 0] = torch.nan, torch.inf
        expected = model(x)
        for small in (True, False):
            result = plan_of(model, (2, 8, 20), 2, small=small)(x)
            assert torch.equal(result.isfinite(), expected.isfinite())


def test_a_mean_in_its_graph() -> None:
    plan = plan_of(nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(2)).eval(), (1, 5, 5), 1, small=True)
    operations = [node.operation for node in plan._graph.nodes]  # type: ignore[union-attr]
    assert isinstance(operations[1], UnevenMean)
    assert (operations[1].geometry.before, operations[1].geometry.after) == ((0, 0), (1, 1))
