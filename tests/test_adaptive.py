"""ROIs that follow the image: against target layers of each image's own ROIs, in float64; and how they are counted."""

from __future__ import annotations

import copy

import pytest
import torch
from as_function import as_function
from torch import Tensor, nn
from torch.nn import functional as F

import tkn
from tkn.adaptive import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d, adaptive_layers, locator_parameters
from tkn.fixed_rois import fix_rois_
from tkn.models.common import initialise
from tkn.models.dense import densified
from tkn.models.weights import fit_weights
from tkn.roi_count import RoiCount

PLAIN = {AdaptiveConv1d: tkn.TargetConv1d, AdaptiveConv2d: tkn.TargetConv2d, AdaptiveConv3d: tkn.TargetConv3d}
SIZE = (9, 8, 7)


def moving(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer in float64, with small ROIs that follow the image."""
    torch.manual_seed(seed)
    layer.reset_parameters()
    layer = layer.double()
    with torch.no_grad():
        layer.loc.uniform_(0.4, 0.6)
        layer.scale.uniform_(0.3, 0.5)
        for name, parameter in layer.locator.named_parameters():
            if name.startswith(("saliency", "size")):
                parameter.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", list(PLAIN))
def test_each_image_has_the_target_layer_of_its_own_rois(kind: type[nn.Module], clip: bool) -> None:
    dims = kind.num_dims
    layer = moving(kind(2, 3, 3, padding=1, clip=clip))
    x = torch.randn(4, 2, *SIZE[:dims], dtype=torch.float64)
    loc, scale = layer.located(x)
    assert loc.shape == scale.shape == (4, dims, 3)
    assert loc.std(dim=0).min() > 1e-4
    assert scale.std(dim=0).min() > 1e-4
    plain = PLAIN[kind](2, 3, 3, padding=1, clip=clip, engine="dense").double()
    y = layer(x)
    for image in range(4):
        plain.load_state_dict(
            {"weight": layer.weight, "bias": layer.bias, "loc": loc[image], "scale": scale[image]}, strict=True
        )
        assert torch.allclose(y[image], plain(x[image, None])[0], rtol=1e-9, atol=1e-12)
        assert torch.equal(layer.image_rois(x)[image], plain.rois(SIZE[:dims]))
        before = plain.scale.detach().clone(), plain.loc.detach().clone()
        plain.project_(SIZE[:dims])
        assert torch.allclose(plain.scale, before[0])  # within their range
        assert torch.allclose(plain.loc, before[1])
    assert torch.allclose(layer(x[0]), y[0], rtol=1e-9, atol=1e-12)
    assert torch.equal(layer.image_rois(x[0]), layer.image_rois(x)[:1])
    assert layer(x[:0]).shape == (0, *y.shape[1:])
    assert layer.why(x) == "dense: the ROI engine knows no ROIs of each image"


def test_it_starts_as_the_static_layer_whatever_the_image() -> None:
    torch.manual_seed(0)
    layer = AdaptiveConv2d(3, 4, 3, padding=1, min_size=4)
    plain = tkn.TargetConv2d(3, 4, 3, padding=1, min_size=4)
    with torch.no_grad():
        plain.loc.uniform_(0.2, 0.8)
        plain.scale.uniform_(0.1, 1)
        plain.project_((23, 17))
    layer.load_state_dict({**layer.state_dict(), **plain.state_dict()})
    x = 5 * torch.randn(3, 3, 23, 17)
    for found, static in zip(layer.located(x), (plain.loc, plain.scale), strict=True):
        assert torch.equal(found, static.expand_as(found))
    assert torch.allclose(layer(x), plain.dense(x), atol=1e-6)
    model = nn.Sequential(AdaptiveConv2d(3, 4, 3))
    initialise(model)
    assert (model[0].locator.saliency.weight == 0).all()


def test_a_pattern_elsewhere_moves_the_rois_along() -> None:
    layer = moving(AdaptiveConv2d(1, 2, 3, padding=1), seed=2)
    with torch.no_grad():
        layer.locator.saliency.weight.mul_(10)
    x = torch.zeros(1, 1, 56, 56, dtype=torch.float64)
    x[:, :, 12:24, 20:28] = 1
    moved = x.roll((16, -8), dims=(2, 3))
    (here, _), (there, _) = layer.located(x), layer.located(moved)
    assert torch.allclose(there - here, torch.tensor([16 / 56, -8 / 56]).double()[:, None].expand_as(here), atol=0.03)


def test_where_to_look_does_not_follow_the_size_of_the_inner_weights() -> None:
    layer = moving(AdaptiveConv2d(2, 3, 3, padding=1))
    x = torch.rand(4, 2, 12, 12, dtype=torch.float64)
    before = layer.locator(x)
    assert before[0].abs().max() > 0.01
    with torch.no_grad():
        for inner in (layer.locator.reduce, layer.locator.near):
            inner.weight.mul_(10)
            inner.bias.mul_(10 if inner is layer.locator.reduce else 100)
    for found, expected in zip(layer.locator(x), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_gradients() -> None:
    layer = moving(AdaptiveConv2d(1, 2, 3, padding=1, min_size=1))
    x = torch.randn(2, 1, 6, 5, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(as_function(layer), (x, *layer.parameters()))


def test_the_first_gradients_reach_what_finds_the_place() -> None:
    torch.manual_seed(0)
    layer = AdaptiveConv2d(2, 3, 3, padding=1)
    F.relu(layer(torch.randn(4, 2, 20, 20))).mean().backward()
    assert layer.locator.saliency.weight.grad.abs().max() > 0
    assert layer.locator.size.weight.grad.abs().max() > 0


def test_multiply_adds_are_the_mean_over_the_images_that_were_seen() -> None:
    layer = moving(AdaptiveConv2d(2, 3, 3, padding=1, bias=False)).float()
    x = torch.randn(5, 2, 20, 16)
    locating = 14 * 14 * (2 * 8 + 8 * 8 * 9 + 8 * 25) + 9 * 2
    static = tkn.count_macs(layer, (2, 20, 16))
    assert static.total_dense == 3 * 18 * 320  # of the dense layer, which locates nothing
    assert static.total_roi == 18 * int(layer.areas((20, 16)).sum()) + locating
    with tkn.ImageRois(layer) as rois, torch.no_grad():
        layer(x[:3])
        layer(input=x[3:])
    sides = layer.image_rois(x)[..., 1] - layer.image_rois(x)[..., 0]
    counted = tkn.count_macs(layer, (2, 20, 16), rois)
    assert counted.total_roi == round(18 * int(sides.prod(dim=2).sum()) / 5) + locating
    assert counted.total_roi != static.total_roi
    (row,) = counted.target_layers
    assert row.mean_roi == pytest.approx(sides.double().mean(dim=(0, 1)).tolist())
    assert tkn.count_macs(layer, (2, 30, 30), rois).total_roi == tkn.count_macs(layer, (2, 30, 30)).total_roi
    layer(x)  # beyond the context nothing is seen
    assert tkn.count_macs(layer, (2, 20, 16), rois).total_roi == counted.total_roi


class _Mixed(nn.Module):
    """Adaptive and plain layers, of one and two dimensions, one of them run on maps of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.near = moving(AdaptiveConv2d(2, 3, 3, padding=1), seed=3).float()
        torch.manual_seed(5)
        self.plain = tkn.TargetConv2d(3, 3, 3, padding=1)
        self.line = moving(AdaptiveConv1d(3, 4, 3, padding=1, min_size=4), seed=4).float()

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(self.near(x))
        return self.line(self.plain(y[..., ::2, ::2]).flatten(2))


def test_a_budgets_count_is_that_of_the_images_that_were_seen() -> None:
    model = _Mixed()
    x, size = torch.randn(5, 2, 16, 12), (2, 16, 12)
    count = RoiCount(model, size)
    static = count.fixed + int(count.macs(count.loc(), count.scale()).sum())
    count.see()  # nothing yet
    assert static == count.now == tkn.count_macs(model, size).total_roi
    with tkn.ImageRois(model) as rois:
        model(x)
    count.see()
    seen = count.fixed + float(count.macs(count.loc(), count.scale()).sum())
    assert seen == pytest.approx(tkn.count_macs(model, size, rois).total_roi, abs=1)  # whole numbers of each layer
    assert abs(seen - static) > 100
    assert copy.deepcopy(model).near.moves is None


def test_a_budget_refuses_adaptive_layers_whose_scale_is_frozen() -> None:
    model = _Mixed()
    model.near.scale.requires_grad_(False)
    with pytest.raises(ValueError, match="scale of layer 'near' is frozen and its ROIs follow the image"):
        tkn.Budget(model, (2, 16, 12), share=0.9)


def test_a_budget_is_held_in_the_images_of_each_step() -> None:
    model = _Mixed()
    size = (2, 16, 12)
    count = RoiCount(model, size)
    budget = tkn.Budget(model, size, macs=(count.least + count.now) / 2, steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(7):
        torch.manual_seed(step)
        x = torch.randn(6, *size)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        before = copy.deepcopy(model)  # with what found the ROIs of these images
        optimizer.step()
        budget.step()
        for layer, static in ((before.near, model.near), (before.plain, model.plain), (before.line, model.line)):
            layer.loc.data, layer.scale.data = static.loc.data, static.scale.data
        with torch.no_grad(), tkn.ImageRois(before) as rois:
            before(x)
        over = tkn.count_macs(before, size, rois).total_roi - budget.planned()
        # A kernel of the layer that runs twice, on 16x12 and 8x6, loses a row or column at both ends at once.
        assert -2 * 27 * (16 + 8) < over < 0.005 * (budget.planned() - count.fixed)
    assert budget.met


def test_the_penalty_is_on_the_images_own_scales() -> None:
    layer = moving(AdaptiveConv2d(1, 2, 3, padding=1))
    x = torch.randn(3, 1, 12, 12, dtype=torch.float64)
    static = float(layer.scale.detach().square().sum())
    assert tkn.scale_penalty(layer, 2.0).item() == pytest.approx(2 * static)
    layer(x)
    copy.deepcopy(layer)
    _, factor = layer.locator(x)
    penalty = tkn.scale_penalty(layer, 2.0)
    expected = (factor[:, :, None] * layer.scale).square().sum(dim=(1, 2)).mean()
    assert penalty.item() == tkn.scale_penalty(layer, 2.0).item() == pytest.approx(2 * expected.item())
    penalty.backward()
    assert layer.locator.size.weight.grad.abs().max() > 0
    layer.eval()
    assert tkn.scale_penalty(layer, 2.0).item() == pytest.approx(2 * static)


def test_conversions() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)).eval()
    x = torch.randn(2, 2, 15, 15)
    model = tkn.targetize(dense, adaptive=True)
    assert not any(module.training for module in model.modules())
    assert list(adaptive_layers(model)) == ["0", "2"]
    assert torch.allclose(model(x), dense(x), atol=1e-6)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert "0.locator.near.weight" in locator_parameters(model)
    groups = tkn.parameter_groups(model, 0.1, attention_lr=0.5)
    assert {id(p) for p in groups[-1]["params"]} == {
        id(p) for layer in (model[0], model[2]) for p in (layer.loc, layer.scale)
    }
    again = densified(model)
    assert [type(layer) for layer in again] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert torch.allclose(again(x), dense(x), atol=1e-6)
    # The weights of a network, and those of one with learned ROIs.
    static = tkn.targetize(dense)
    with torch.no_grad():
        static[0].scale.fill_(0.4)
    for weights in (dense.state_dict(), static.state_dict()):
        fresh = tkn.targetize(nn.Sequential(*copy.deepcopy(dense)), adaptive=True)
        fit_weights(fresh, weights, "weights")
        assert torch.equal(fresh[0].weight, dense[0].weight)
    assert (fresh[0].scale == 0.4).all()


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"engine=roi computes no AdaptiveConv2d: .* ROIs of each image"):
        AdaptiveConv2d(1, 2, 3, engine="roi")
    model = nn.Sequential(AdaptiveConv2d(1, 2, 3))
    with pytest.raises(ValueError, match=r"a plan's ROIs are the same for all images, .* layer '0' .*adaptive"):
        tkn.accelerate(model, 1, (1, 8, 8))
    with pytest.raises(ValueError, match=r"ROIs that do not learn .* layer '0' is a AdaptiveConv2d"):
        fix_rois_(model, model.state_dict(), (1, 8, 8))
