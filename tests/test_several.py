"""Several windows of an output channel: mixtures and parts against plain arithmetic in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from as_function import as_function
from torch import Tensor, nn
from torch.nn import functional as F

import tkn
from tkn.kinds import target_layer
from tkn.models.dense import densified
from tkn.models.weights import fit_weights
from tkn.penalty import kernel_costs
from tkn.roi_count import RoiCount
from tkn.several import MixtureConv1d, MixtureConv2d, MixtureConv3d, PartsConv1d, PartsConv2d, PartsConv3d

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def scattered(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer in float64 with ROIs at random places."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        layer.loc.copy_(0.2 + 0.6 * torch.rand(layer.loc.shape, generator=generator, dtype=torch.float64))
        layer.scale.copy_(0.3 + 0.4 * torch.rand(layer.scale.shape, generator=generator, dtype=torch.float64))
    return layer


def window_and_roi(layer: nn.Module, index: int, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One window of a Cauchy layer and whether each pixel is in its ROI, pixel by pixel."""
    window, inside = torch.ones(size, dtype=torch.float64), torch.ones(size, dtype=torch.bool)
    for axis, length in enumerate(size):
        loc, scale = layer.loc[axis, index].item(), layer.scale[axis, index].item()
        for pixel in range(length):
            here = [slice(None)] * axis + [pixel]
            place = (pixel + 0.5) / length
            window[tuple(here)] *= 1 / (1 + ((place - loc) / (0.5 * scale)) ** 2)
            inside[tuple(here)] &= abs(place - loc) <= scale / 2**0.5
    return window, inside


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("combine", ["max", "sum"])
@pytest.mark.parametrize("kind", [MixtureConv1d, MixtureConv2d, MixtureConv3d])
def test_a_mixture_is_the_convolution_times_its_windows(kind: type[nn.Module], combine: str, clip: bool) -> None:
    dims = kind.num_dims
    size = (7, 6, 5)[:dims]
    layer = scattered(kind(2, 3, 3, padding=1, windows=2, combine=combine, clip=clip))
    x = torch.randn(2, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = CONVOLUTIONS[dims](x, layer.weight, layer.bias, padding=1)
    for channel in range(3):
        (one, in_one), (other, in_other) = (window_and_roi(layer, 2 * channel + k, size) for k in range(2))
        mixture = torch.maximum(one, other) if combine == "max" else one + other
        union = in_one | in_other
        assert torch.equal(layer.union(size)[channel], union)
        assert layer.areas(size)[channel] == union.sum()
        expected[:, channel] *= torch.where(union, mixture, 0.0) if clip else mixture
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(layer(x[0]), layer(x)[0])
    assert layer.why(x).startswith("dense: ")


@pytest.mark.parametrize("kind", [PartsConv1d, PartsConv2d, PartsConv3d])
def test_parts_are_a_sum_of_target_layers(kind: type[nn.Module]) -> None:
    dims = kind.num_dims
    size = (7, 6, 5)[:dims]
    layer = scattered(kind(2, 4, 3, padding=1, groups=2, windows=3, engine="dense"))
    x = torch.randn(2, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(2, 4, *size, dtype=torch.float64)
    for channel in range(4):
        group = x[:, channel // 2, None]
        for part in range(3):
            index = 3 * channel + part
            window, inside = window_and_roi(layer, index, size)
            weight, bias = layer.weight[index, None], layer.bias[index, None]
            expected[:, channel] += CONVOLUTIONS[dims](group, weight, bias, padding=1)[:, 0] * window * inside
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(layer.dense(x), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize(
    "layer",
    [
        MixtureConv2d(1, 2, 3, padding=1, combine="max"),
        MixtureConv2d(1, 2, 3, padding=1, combine="sum"),
        PartsConv2d(1, 2, 3, padding=1, engine="dense"),
    ],
    ids=["max", "sum", "parts"],
)
def test_gradients(layer: nn.Module) -> None:
    layer = scattered(layer)
    x = torch.randn(2, 1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    assert torch.autograd.gradcheck(as_function(layer), (x, *layer.parameters()))


def test_windows_start_apart_with_whole_maps_and_part_as_they_learn() -> None:
    torch.manual_seed(0)
    for layer in (MixtureConv2d(1, 2, 3, padding=1, windows=3), PartsConv2d(1, 2, 3, padding=1, windows=3)):
        assert (layer.rois((28, 20)) == torch.tensor([[0, 28], [0, 20]])).all()
        places = layer.loc.detach()
        assert ((places - 0.5).norm(dim=0) < 0.051).all()
        assert len({tuple(place) for place in places.T.tolist()}) == 6
        layer(torch.randn(2, 1, 28, 20)).square().sum().backward()
        assert len({tuple(grad) for grad in layer.scale.grad.T.tolist()}) == 6
        assert (MixtureConv2d(1, 2, 3, windows=1).loc == 0.5).all()


@pytest.mark.parametrize("windows", [2, 3, 4, 7])
@pytest.mark.parametrize("kind", [MixtureConv1d, MixtureConv3d, PartsConv1d, PartsConv3d])
def test_windows_start_apart_in_any_number_of_dimensions(kind: type[nn.Module], windows: int) -> None:
    layer = kind(1, 5, 3, windows=windows)
    size = (20,) * kind.num_dims
    assert (layer.rois(size) == torch.tensor([0, 20])).all()
    places = layer.loc.detach()
    assert ((places - 0.5).norm(dim=0) < 0.051).all()
    for channel in places.unflatten(1, (5, windows)).unbind(1):
        assert torch.pdist(channel.T).min() > 0.01


def test_multiply_adds() -> None:
    mixture = MixtureConv2d(2, 3, 3, padding=1, bias=False)
    parts = PartsConv2d(2, 3, 3, padding=1, bias=False)
    with torch.no_grad():
        for layer in (mixture, parts):
            # Of each channel a 4x4 square at one corner of an 8x8 map, and one that is half upon it.
            layer.scale.fill_(0.5 / 2**0.5 - 1e-4)
            layer.loc[:] = torch.tensor([[0.25, 0.25], [0.25, 0.5]]).repeat(1, 3)
    assert (tkn.count_macs(mixture, (2, 8, 8)).total_dense, tkn.count_macs(mixture, (2, 8, 8)).total_roi) == (
        3 * 18 * 64,
        3 * 18 * 24,
    )
    assert (tkn.count_macs(parts, (2, 8, 8)).total_dense, tkn.count_macs(parts, (2, 8, 8)).total_roi) == (
        3 * 18 * 64,  # of the dense layer
        6 * 18 * 16,
    )
    whole = RoiCount(tkn.targetize(nn.Sequential(nn.Conv2d(2, 3, 3)), windows=2, combine="parts"), (2, 8, 8))
    assert (whole.dense, whole.most, whole.now) == (3 * 18 * 36, 6 * 18 * 36, 6 * 18 * 36)
    assert kernel_costs(nn.Sequential(parts, PartsConv2d(3, 3, 3, padding=1, windows=3)), (2, 8, 8)) == {
        "0": pytest.approx(18 / ((6 * 18 + 9 * 27) / 15)),
        "1": pytest.approx(27 / ((6 * 18 + 9 * 27) / 15)),
    }
    assert tkn.scale_penalty(mixture, 1.0).item() == pytest.approx(mixture.scale.square().sum().item())


def test_what_cannot_be() -> None:
    for kind in (MixtureConv2d, PartsConv2d):
        for windows in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=f"windows={windows} must be a whole number, at least 1"):
                kind(1, 2, 3, windows=windows)
    with pytest.raises(ValueError, match="unknown combine 'mx'; did you mean 'max'"):
        MixtureConv2d(1, 2, 3, combine="mx")
    with pytest.raises(ValueError, match="engine=roi computes no MixtureConv2d"):
        MixtureConv2d(1, 2, 3, engine="roi")
    with pytest.raises(ValueError, match="out_channels=3 must be divisible by groups=2"):
        PartsConv2d(2, 3, 3, groups=2)
    with pytest.raises(ValueError, match="windows=2 must be 1"):
        target_layer(2, windows=2, adaptive=True)
    with pytest.raises(ValueError, match="adaptive='no' must be true or false"):
        target_layer(2, adaptive="no")
    with pytest.raises(RuntimeError, match=r"combine=max, not .*combine=sum"):
        MixtureConv2d(1, 2, 3, combine="sum").load_state_dict(MixtureConv2d(1, 2, 3).state_dict())
    mixture = tkn.targetize(nn.Sequential(nn.Conv2d(1, 2, 3)), windows=2)
    with pytest.raises(ValueError, match="layer '0' is a MixtureConv2d, whose ROIs are unions of rectangles"):
        tkn.Budget(mixture, (1, 8, 8), share=0.5)


def test_parts_take_a_convolutions_kernels_and_give_them_back() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)).eval()
    x = torch.randn(2, 2, 9, 8)
    parts = tkn.targetize(dense, windows=2, combine="parts", scale_unit=0.6)
    assert [type(layer) for layer in parts] == [PartsConv2d, nn.ReLU, PartsConv2d]
    assert torch.allclose(parts(x), dense(x), atol=1e-6)  # this wide a flat window is 1 on the whole map
    loaded = tkn.targetize(nn.Sequential(*[PartsConv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)]))
    loaded.load_state_dict(dense.state_dict(), strict=False)
    assert torch.allclose(loaded[0].weight[1], dense[0].weight[0] / 2)
    again = densified(parts)
    assert [type(layer) for layer in again] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert torch.allclose(again(x), dense(x), atol=1e-6)
    fresh = tkn.targetize(copy.deepcopy(dense), windows=2, combine="parts", scale_unit=0.6)
    nn.init.normal_(fresh[0].weight)
    assert fit_weights(fresh, dense.state_dict(), "weights") >= {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert torch.allclose(fresh(x), dense(x), atol=1e-6)


def test_parts_keep_what_a_convolution_is() -> None:
    dense = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3)).to(memory_format=torch.channels_last)
    dense[0].bias.requires_grad_(False)
    parts = tkn.targetize(dense, windows=3, combine="parts")
    assert parts[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert (parts[0].weight.requires_grad, parts[0].bias.requires_grad) == (True, False)
    dense.append(nn.Conv2d(3, 3, 3))
    dense[2].weight = dense[1].weight
    with pytest.raises(ValueError, match="layer '1' shares its weight with another, and parts have more kernels"):
        tkn.targetize(dense, windows=3, combine="parts", inplace=True)
    assert type(dense[0]) is nn.Conv2d


def test_parts_have_budgets_and_projections() -> None:
    torch.manual_seed(0)
    model = tkn.targetize(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1)), windows=2, combine="parts")
    budget = tkn.Budget(model, (1, 12, 12), share=0.4, steps=3)
    optimizer = torch.optim.SGD(tkn.parameter_groups(model, 1e-4), lr=0.01)
    for _ in range(3):
        model(torch.randn(2, 1, 12, 12)).square().sum().backward()
        optimizer.step()
        budget.step()
        optimizer.zero_grad()
    assert budget.macs == round(0.4 * 4 * 9 * 144)  # of the dense layer's
    assert tkn.count_macs(model, (1, 12, 12)).total_roi <= budget.macs
    assert tkn.Budget(model, (1, 12, 12), share=1.5).macs == 1.5 * 4 * 9 * 144
    tkn.project_(model)


@pytest.mark.parametrize("combine", ["max", "parts"])
def test_plans_are_exact(combine: str) -> None:
    torch.manual_seed(0)
    model = tkn.targetize(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)),
        windows=2,
        combine=combine,
    ).eval()
    with torch.no_grad():
        model[2].scale.mul_(0.4)
    x = torch.randn(2, 1, 12, 12)
    plan = tkn.accelerate(model, 2, (1, 12, 12))
    assert torch.allclose(plan(x), model(x), atol=1e-5)
    if combine == "parts":
        assert not plan.fallbacks
    else:
        assert plan.fallbacks == ("0 (MixtureConv2d)", "2 (MixtureConv2d)")
        with pytest.raises(ValueError, match=r"the plan can't be saved: .* 0 \(MixtureConv2d\), 2 \(MixtureConv2d\)"):
            plan.save("nowhere.plan")
