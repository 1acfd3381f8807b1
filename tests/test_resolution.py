"""`tkn.at_resolution`: a network's ROIs stay the same parts of images of another size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tkn
from tkn.layers import roi_layers

SMALL, LARGE = (1, 16, 16), (1, 24, 40)


def small_rois(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for layer in roi_layers(model).values():
        nn.init.uniform_(layer.loc, 0.2, 0.8)
        nn.init.uniform_(layer.scale, 0.15, 0.6)
    model.eval()(torch.zeros(1, *SMALL))
    tkn.project_(model)
    return model


def test_rois_are_the_same_parts_of_other_maps() -> None:
    model = small_rois(tkn.build_model("tdn10", SMALL, 10, engine="dense"))
    other = tkn.at_resolution(model, LARGE)
    assert other is not model
    assert not other.training
    for name, layer in roi_layers(other).items():
        before = model.get_submodule(name)
        assert layer.map_size == (24 // 2**layer.block, 40 // 2**layer.block)
        assert before.map_size == (16 // 2**layer.block,) * 2
        torch.testing.assert_close(layer.loc, before.loc)
        torch.testing.assert_close(layer.scale, before.scale)
        sides = (layer.rois(layer.map_size)[..., 1] - layer.rois(layer.map_size)[..., 0]).double()
        assert sides.min() >= 3
    # Multiply-adds grow with the maps, all in the same proportion but for the ROIs' pixels.
    report, old = tkn.count_macs(other, LARGE), tkn.count_macs(model, SMALL)
    assert report.total_dense / old.total_dense == pytest.approx(24 * 40 / 256, rel=0.01)
    assert report.total_roi / old.total_roi == pytest.approx(24 * 40 / 256, rel=0.15)


def test_min_size_holds_on_smaller_maps() -> None:
    model = small_rois(tkn.build_model("tdn10", SMALL, 10, engine="dense"))
    other = tkn.at_resolution(model, (1, 12, 12))
    grown = 0
    for name, layer in roi_layers(other).items():
        rois = layer.rois(layer.map_size)
        assert (rois[..., 1] - rois[..., 0]).min() >= 3
        grown += int((layer.scale > model.get_submodule(name).scale).sum())
    assert grown > 0


def test_a_flat_network_is_the_dense_one_at_any_resolution() -> None:
    torch.manual_seed(0)
    dense = tkn.build_model("dn10", SMALL, 10).eval()
    other = tkn.at_resolution(tkn.targetize(dense, engine="dense"), LARGE)
    x = torch.randn(2, *LARGE)
    torch.testing.assert_close(other(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", [(1, 24, 40), (1, 12, 16)])
def test_a_resampled_fully_connected_layer_reads_resampled_maps(to: tuple[int, ...]) -> None:
    model = small_rois(tkn.build_model("tkn6", SMALL, 10, engine="dense")).double()
    other = tkn.at_resolution(model, to, resample_from=SMALL)
    x = torch.rand(2, *to, dtype=torch.float64)
    maps = other[:8](x)
    assert maps.shape[2:] == (to[1] // 4, to[2] // 4)
    read = F.interpolate(maps, (4, 4), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(other(x), model[8:](read))
    assert model[9].in_features == 128 * 16
    assert other[9].in_features == maps[0].numel()
    # At its own resolution nothing changes.
    same = tkn.at_resolution(model, SMALL, resample_from=SMALL)
    torch.testing.assert_close(same[9].weight, model[9].weight)


def test_fully_connected_layers_of_a_transformer_network_and_of_functions() -> None:
    stn = tkn.build_model("tstn", (1, 32, 32), 4, engine="dense").eval()
    assert tkn.at_resolution(stn, (1, 48, 64), resample_from=(1, 32, 32))(torch.rand(2, 1, 48, 64)).shape == (2, 4)

    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3 * 16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.flatten(F.max_pool2d(self.conv(x), 2), 1))

    own = Functions()
    x = torch.rand(1, 1, 8, 8)
    large = tkn.at_resolution(own, (1, 16, 16), resample_from=(1, 8, 8))
    assert large.fc.in_features == 3 * 64
    assert large(torch.rand(1, 1, 16, 16)).shape == own(x).shape


class Heads(nn.Module):
    """Two fully connected layers on one map, the first used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3 * 64, 2), nn.Linear(3 * 64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.conv(x).flatten(1)
        return torch.cat([self.one(maps), self.two(maps), self.one(maps)], 1)


@pytest.mark.parametrize("to", [(1, 4, 16), (1, 12, 20)])
def test_every_layer_that_reads_a_map_is_resampled_once_also_to_as_many_pixels(to: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Heads().double()
    other = tkn.at_resolution(model, to, resample_from=(1, 8, 8))
    x = torch.rand(2, *to, dtype=torch.float64)
    read = F.interpolate(model.conv(x), (8, 8), mode="bilinear", align_corners=False, antialias=True).flatten(1)
    torch.testing.assert_close(other(x), torch.cat([model.one(read), model.two(read), model.one(read)], 1))


def test_a_layer_after_another_reads_no_map_though_it_has_as_many_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(4), nn.Flatten())
    model.extend([nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)])
    other = tkn.at_resolution(model, (1, 16, 12), resample_from=(1, 8, 8))
    assert other[3].in_features == 4 * 12
    assert torch.equal(other[5].weight, model[5].weight)


@pytest.mark.parametrize(
    "pooling", [nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(2), nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.ReLU())]
)
def test_maps_of_one_size_at_all_resolutions(pooling: nn.Module) -> None:
    features = pooling(torch.rand(1, 4, 8, 8)).numel()
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), pooling, nn.Flatten(), nn.Linear(features, 4), nn.Linear(4, 4))
    x = torch.rand(2, 1, 12, 20)
    assert torch.equal(tkn.at_resolution(model, (1, 12, 20))(x), model(x))
    assert torch.equal(tkn.at_resolution(model, (1, 12, 20), resample_from=(1, 8, 8))(x), model(x))


class TwoSizes(nn.Module):
    """One layer on maps of two sizes, the smaller one first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = tkn.TargetConv2d(1, 3, 3, padding=1, engine="dense")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.max_pool2d(x, 4)).mean((2, 3)) + self.conv(x).mean((2, 3))


def test_min_size_holds_on_all_maps_of_a_layer() -> None:
    model = TwoSizes()
    nn.init.constant_(model.conv.scale, 0.1)
    other = tkn.at_resolution(model, (1, 16, 24))
    sides = other.conv.rois((4, 6))
    assert (sides[..., 1] - sides[..., 0]).min() >= 3
    # A map that is smaller than that is held whole, as in training.
    other = tkn.at_resolution(model, (1, 8, 16))
    sides = other.conv.rois((2, 4))
    assert (sides[..., 0, :] == torch.tensor([0, 2])).all()
    assert (sides[:, 1, 1] - sides[:, 1, 0]).min() >= 3


class View(nn.Module):
    """Flattens so that more pixels are more images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3 * 64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).view(-1, 3 * 64))


class ChannelsLast(nn.Module):
    """Flattens pixels before channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3 * 64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).permute(0, 2, 3, 1).flatten(1))


class Branches(nn.Module):
    """Two maps of as many pixels, each read by a layer of its own behind a gate; and a sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.gate, self.a, self.b = nn.Linear(2, 1), nn.Linear(2 * 64, 3), nn.Linear(8 * 16, 3)

    def read(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        one = self.one(x)
        return one, self.two(one), self.gate(one.mean((2, 3))).sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two, gate = self.read(x)
        return (self.a(input=one.flatten(1) * gate) + self.b(two.flatten(1).relu())).unsqueeze(0).expand(5, -1, -1)


def test_each_layer_is_resampled_from_the_map_that_it_reads() -> None:
    torch.manual_seed(0)
    model = Branches().double()
    other = tkn.at_resolution(model, (1, 16, 12), resample_from=(1, 8, 8))
    x = torch.rand(2, 1, 16, 12, dtype=torch.float64)
    one, two, gate = model.read(x)

    def resampled(maps: torch.Tensor, side: int) -> torch.Tensor:
        return F.interpolate(maps, (side, side), mode="bilinear", align_corners=False, antialias=True).flatten(1)

    expected = model.a(resampled(one, 8) * gate) + model.b(resampled(two.relu(), 4))
    torch.testing.assert_close(other(x)[0], expected)


class Pooled(nn.Module):
    """What a fully connected layer reads is of one size whatever the image's: by attention, products, branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.side = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.query, self.attention = nn.Parameter(torch.zeros(1, 1, 4)), nn.MultiheadAttention(4, 1, batch_first=True)
        self.a, self.b, self.c = nn.Linear(4, 2), nn.Linear(16, 2), nn.Linear(16, 2)
        self.d = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.conv(x)
        pixels = maps.flatten(2).mT
        attended, _ = self.attention(self.query.expand(len(x), -1, -1), pixels, pixels)
        pooled = F.adaptive_avg_pool2d(maps, 2)
        return (
            self.a(attended.flatten(1))
            + self.b((pixels.mT @ pixels).flatten(1))
            + self.c((self.side(pooled) + pooled).flatten(1))
            + self.d(maps.mean((2, 3)))
        )


@pytest.mark.parametrize("size", [(1, 8, 8), (1, 20, 12), (1, 1, 1)])
def test_what_is_of_one_size_is_left_as_it_is(size: tuple[int, ...]) -> None:
    model = Pooled()
    x = torch.rand(2, *size)
    for resample_from in (None, (1, 8, 8), (1, 1, 1)):
        assert torch.equal(tkn.at_resolution(model, size, resample_from=resample_from)(x), model(x))


def parametrized() -> nn.Module:
    model = Heads()
    nn.utils.parametrizations.spectral_norm(model.two)
    return nn.Sequential(model.conv, nn.Flatten(), model.two)


@pytest.mark.parametrize(
    ("model", "size", "options", "message"),
    [
        ("tdn10", (1, 8, 8), {}, "layer 'block3.0.layers.conv1' have 2x2 pixels, fewer than its min_size=3x3"),
        ("tdn10", (1, 2, 16), {}, "can't take images of 1x2x16"),
        ("tdn10", (3, 16, 16), {}, "can't take images of 3x16x16"),
        ("tdn10", (1, 16, 0), {}, r"input_size=\(1, 16, 0\) must be"),
        ("tdn10", (16,), {}, "input_size"),
        ("tkn6", (1, 24, 24), {}, "layer '9' would read 4608 numbers and has weights for 2048.*resample_from="),
        ("tkn6", (1, 24, 24), {"resample_from": (1, 20, 20)}, "resample_from: .* can't take images of 1x20x20"),
        ("tkn6", (1, 24, 24), {"resample_from": (1, 2.5, 2)}, "resample_from=.* must be"),
        ("tkn6", (1, 8, 32), {}, "layer '9' knows each pixel of the map 128x2x8 that it reads.*resample_from="),
        (View(), (1, 16, 16), {}, "View gives 4 rows of outputs for one image of 1x16x16.*flatten"),
        (View(), (1, 16, 16), {"resample_from": (1, 8, 8)}, "it reads 3x8x8 there and no map here"),
        (parametrized(), (1, 12, 12), {"resample_from": (1, 8, 8)}, "its weight is not a plain parameter"),
        ("tdn10", 32, {}, "input_size=32 must be"),
        (nn.Sequential(nn.Conv2d(1, 3, 8), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9, 2)), (1, 9, 13), {}, "3x1x3"),
        (ChannelsLast(), (1, 12, 12), {"resample_from": (1, 8, 8)}, "can't be resampled"),
    ],
)
def test_bad_input(model: str | nn.Module, size: Any, options: dict[str, Any], message: str) -> None:
    made = tkn.build_model(model, SMALL, 10, engine="dense") if isinstance(model, str) else model
    with pytest.raises(ValueError, match=message):
        tkn.at_resolution(made, size, **options)
