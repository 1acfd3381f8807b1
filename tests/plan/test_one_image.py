"""Small batches: maps in all orders of their numbers, with all that convolutions can be, against float64."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from engine_cases import assert_near, place_rois, same_with_threads, targeted, truth
from plan_networks import plan_of
from torch import Tensor, nn

from tkn import TargetConv2d
from tkn.backends.cpu.structs import Kind
from tkn.plan.capture import build_graph, frozen
from tkn.plan.lower_maps import MapLowering
from tkn.plan.maps import Order
from tkn.plan.neighbours import with_neighbours

FUNCTIONS = (nn.ReLU, nn.SiLU, nn.Hardswish, nn.Identity, nn.ELU)


def random_network(seed: int, width: int, first: int) -> nn.Sequential:
    """Layers of any kernel, stride, dilation, groups and pooling, on maps of about `width` columns."""
    chosen, channels, side = Random(seed), first, width
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(chosen.randint(2, 4)):
        kernel, outputs = chosen.choice((1, 1, 3, 3, 3, 5, 7)), chosen.choice((4, 12, 18, 24))
        dilation = chosen.choice((1, 1, 1, 2))
        reach = (kernel - 1) * dilation + 1
        padding = chosen.choice((reach // 2, reach // 2, 0))
        if side + 2 * padding < reach:
            kernel, dilation, reach, padding = 1, 1, 1, 0
        groups = chosen.choice([g for g in (1, 1, 2, channels) if channels % g == 0 and outputs % g == 0] or [1])
        stride = chosen.choice((1, 1, 1, 2, 3))
        kind = chosen.choice((TargetConv2d, TargetConv2d, nn.Conv2d))
        layers.append(
            kind(
                *(channels, outputs, kernel),
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                bias=chosen.random() < 0.5,
            )
        )
        side, channels = (side + 2 * padding - reach) // stride + 1, outputs
        if chosen.random() < 0.5:
            layers.append(nn.BatchNorm2d(channels))
        layers.append(chosen.choice(FUNCTIONS)())
        if chosen.random() < 0.6 and side >= 4:
            layers.append(chosen.choice((nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3))))
            pool = layers[-1]
            side = (side + 2 * int(pool.padding) - int(pool.kernel_size)) // int(pool.stride) + 1  # type: ignore[arg-type]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.compact
def test_random_layers(seed: int) -> None:
    width, first = (9, 20, 37)[seed % 3], (1, 3, 8, 17)[seed % 4]
    model = targeted(random_network(seed, width, first), seed=seed).eval()
    size = (first, width - seed % 2, width)
    batch = 1 + seed % 17
    x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = truth(model)(x.double())
        for small in (True, False):
            plan = plan_of(model, size, batch, small=small)
            assert not plan.fallbacks
            assert_near(plan(x), expected)
            assert_near(plan(x[:1]), expected[:1])


class Gated(nn.Module):
    """Squeeze and excitation, and the product of two maps."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.first = TargetConv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 5, 1), nn.SiLU(), nn.Conv2d(5, channels, 1), nn.Sigmoid()
        )
        self.second = TargetConv2d(channels, channels, 3, padding=1, groups=groups)
        self.third = TargetConv2d(channels, channels, 1)
        self.last = nn.Conv2d(channels, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.norm(self.first(x)))
        a = self.squeeze(a) * a
        b = torch.mul(self.second(a), torch.sigmoid(self.third(a)))
        return self.last(b * self.squeeze(b))


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize(("channels", "groups", "width"), [(12, 1, 20), (20, 20, 7), (16, 1, 5)])
@pytest.mark.compact
def test_products(channels: int, groups: int, width: int, small: bool) -> None:
    torch.manual_seed(0)
    model, size = targeted(Gated(channels, groups), seed=1).eval(), (3, width, width)
    plan = plan_of(model, size, 3, small=small)
    assert not plan.fallbacks
    with torch.no_grad():
        for batch in (3, 1, 10):
            x = torch.randn(batch, *size)
            assert_near(plan(x), truth(model)(x.double()))


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("width", [9, 40])
def test_threads_change_nothing(width: int, batch: int) -> None:
    torch.manual_seed(0)
    model, size = targeted(Gated(12, 1), seed=1).eval(), (3, width, width)
    plan, x = plan_of(model, size, batch, small=True), torch.randn(batch, *size)
    same_with_threads(lambda: [plan(x)])


def test_orders_follow_the_readers() -> None:
    """Wide maps are read along their lines, narrow ones of many channels pixel by pixel, in both walks alike."""
    model = nn.Sequential(
        TargetConv2d(1, 12, 3, padding=1),
        TargetConv2d(12, 12, 3, padding=1),
        nn.AvgPool2d(8),
        nn.Conv2d(12, 64, 1),
        nn.Conv2d(64, 64, 3, padding=1),
    )
    graph = build_graph(frozen(targeted(model, seed=1)), (1, 40, 40))
    lowering = MapLowering(graph, list(range(1, len(graph.nodes))), [0], list(graph.outputs), 16)
    kinds = [instruction.kind for instruction in lowering.instructions if instruction.kind != Kind.MAP_UNPACK]
    assert kinds[1:3] == [Kind.PLANE_CONV, Kind.PLANE_CONV]
    assert kinds[-1] == Kind.MAP_CONV
    orders = [one.order for one in lowering.maps]
    assert orders[1] is Order.LINES
    assert orders[-2] is Order.PIXELS
    for instruction in lowering.instructions:
        if instruction.work is not None:
            assert len(instruction.work) == instruction.parts + 1
            assert (np.diff(instruction.work) > 0).all()


def test_channels_of_near_rois_are_neighbours() -> None:
    """The function stays what it was; of a middle layer whole vectors of channels are zero at many pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        TargetConv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), TargetConv2d(64, 8, 3, padding=1)
    )
    model = targeted(model, seed=1).eval()
    graph = build_graph(frozen(model), (1, 12, 12))
    ordered = with_neighbours(graph)
    before, after = (
        g.nodes[1].operation.mask.numpy().reshape(4, 16, 12, 12).any(axis=1).sum()  # type: ignore[union-attr]
        for g in (graph, ordered)
    )
    assert after < 0.9 * before
    x = torch.randn(2, 1, 12, 12)
    with torch.no_grad():
        assert_near(plan_of(model, (1, 12, 12), 2, small=True)(x), truth(model)(x.double()))


def plans_agree(model: nn.Module, size: tuple[int, int, int], x: Tensor) -> None:
    """Both arrangements and torch, also in where numbers are not finite; the engine computes everything."""
    with torch.no_grad():
        expected = model(x)
        for small in (True, False):
            plan = plan_of(model, size, len(x), small=small)
            assert plan._program is not None
            assert plan._program.way.startswith("vectors")
            result = plan(x)
            assert torch.equal(result.isfinite(), expected.isfinite())
            finite = expected.isfinite()
            assert_near(result[finite], expected[finite])


@pytest.mark.parametrize("kernel", [1, 3])
def test_maps_of_few_channels_with_and_without_room_share_no_memory(kernel: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(a, b, kernel, padding=kernel // 2) for a, b in ((3, 16), (16, 3), (3, 16))]
    x = torch.randn(3, 3, 12, 12)
    x[0, 0, 5, 5] = torch.nan
    plans_agree(nn.Sequential(*layers).eval(), (3, 12, 12), x)


def test_rois_in_what_a_pooling_leaves_out() -> None:
    layer = TargetConv2d(8, 6, 3, padding=1)
    place_rois(layer, "edge", (5, 5), seed=0)
    assert layer.rois((5, 5)).flatten(1).tolist() == 6 * [[4, 5, 4, 5]]
    model = nn.Sequential(layer, nn.MaxPool2d(2))
    plans_agree(model.eval(), (8, 5, 5), torch.randn(2, 8, 5, 5))


def test_a_padded_mean_of_the_whole_map() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.AvgPool2d(3, 3, 1), nn.Conv2d(8, 8, 1, groups=8))
    plans_agree(model.eval(), (4, 5, 5), torch.randn(2, 4, 5, 5))


def test_a_scale_of_zero_keeps_what_is_not_finite() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
    nn.init.zeros_(model[1].weight)
    x = torch.randn(2, 16, 20, 40)
    x[0, 3, 7, 9] = torch.inf
    plans_agree(model.eval(), (16, 20, 40), x)


class Overwriting(nn.Module):
    """A pooling of single pixels has memory of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.relu(nn.functional.adaptive_avg_pool2d(x, 4), inplace=True)


def test_means_of_single_pixels_may_be_overwritten() -> None:
    plans_agree(Overwriting().eval(), (3, 4, 4), torch.randn(2, 3, 4, 4))
