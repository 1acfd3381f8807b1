"""ROIs that do not learn keep the pixels of those that they were made of, to the last one."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn

import tkn
from tkn.fixed_rois import PLACES
from tkn.layers import RoiLayer, roi_layers


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` after a training that moved its ROIs, some of them over the map's border."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in roi_layers(model).values():
            layer.loc.copy_(torch.rand(layer.loc.shape, generator=generator))
            layer.scale.copy_(torch.rand(layer.scale.shape, generator=generator))
    tkn.count_macs(model, (1, 28, 28))
    tkn.project_(model)
    return {name: value.clone() for name, value in model.state_dict().items()}


def _bounds(layer: RoiLayer, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(lo, side) of every ROI along every axis: [C, dims]."""
    lo, hi = layer.rois(size).unbind(-1)
    return lo, hi - lo


@pytest.mark.parametrize("places", PLACES)
def test_a_network_keeps_its_multiply_adds_and_weights(places: str) -> None:
    torch.manual_seed(0)
    state = _learned(trained := tkn.build_model("tdn10", (1, 28, 28), 10))
    model = tkn.build_model("tdn10", (1, 28, 28), 10)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    tkn.fix_rois_(model, state, (1, 28, 28), places=places, seed=3)
    assert torch.equal(torch.get_rng_state(), random_state)  # a run's dropout is what it would have been
    assert tkn.count_macs(model, (1, 28, 28)).total_roi == tkn.count_macs(trained, (1, 28, 28)).total_roi
    moved = 0
    for name, layer in roi_layers(model).items():
        theirs, size = roi_layers(trained)[name], layer.map_size
        assert size is not None
        (lo, side), (lo_before, side_before) = _bounds(layer, size), _bounds(theirs, size)
        assert torch.equal(side, side_before)
        moved += int((lo != lo_before).sum())
        if places == "learned":
            assert torch.equal(layer.loc, theirs.loc)
            assert torch.equal(layer.scale, theirs.scale)
        elif places == "centred":
            assert torch.equal(lo, (size[0] - side) // 2)
        assert not layer.loc.requires_grad
        assert not layer.scale.requires_grad
    assert (moved == 0) == (places == "learned")
    for name, value in model.state_dict().items():
        if name.rpartition(".")[2] not in ("loc", "scale"):
            assert torch.equal(value, weights[name]), name
    assert sum(parameter.requires_grad for parameter in model.parameters()) > 0
    # The projection of a training loop of one's own leaves them.
    before = [layer.rois(layer.map_size or ()) for layer in roi_layers(model).values()]
    tkn.project_(model)
    after = [layer.rois(layer.map_size or ()) for layer in roi_layers(model).values()]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("places", ["centred", "random"])
@pytest.mark.parametrize("length", [*range(1, 41), 48, 56, 61, 96, 112, 150, 224, 511, 1024])
def test_every_size_of_a_roi_on_every_size_of_a_map(length: int, places: str) -> None:
    """Rounding takes no pixel and adds none, also where loc and scale are kept as float32."""
    copies = 20 if length <= 40 else 3
    sides = torch.arange(1, length + 1).repeat(copies)
    layer = tkn.AttentiveRegularization1d(len(sides))
    rois = {"loc": (sides / 2 / length)[None].float(), "scale": (sides / (sqrt(2) * length))[None].float() * 1.00001}
    tkn.fix_rois_(layer, rois, (len(sides), length), places=places)
    lo, kept = _bounds(layer, (length,))
    assert torch.equal(kept[:, 0], sides)
    room = length - sides
    if places == "centred":
        assert torch.equal(lo[:, 0], room // 2)
    else:
        assert ((lo[:, 0] >= 0) & (lo[:, 0] <= room)).all()
    whole = sides == length
    assert (layer.loc[0, whole] == 0.5).all()
    assert torch.equal(layer.scale[0, whole], rois["scale"][0, whole])


def test_random_places_are_uniform_and_the_same_everywhere() -> None:
    kernels, length, side = 6000, 12, 7
    rois = {"loc": torch.full((1, kernels), 0.1), "scale": torch.full((1, kernels), 11.6 / 12 / sqrt(2))}
    places = []
    for seed in (0, 0, 1):
        layer = tkn.AttentiveRegularization1d(kernels)
        tkn.fix_rois_(layer, rois, (kernels, length), places="random", seed=seed)
        lo, sides = _bounds(layer, (length,))
        assert (sides == side).all()  # 11.6 pixels around 1.2, cut to the map
        places.append(lo[:, 0])
    assert torch.equal(places[0], places[1])
    assert not torch.equal(places[0], places[2])
    assert places[0][:12].tolist() == EXPECTED
    counts = torch.bincount(places[0], minlength=6)
    assert len(counts) == 6
    # Five standard deviations of each count.
    assert ((counts - kernels / 6).abs() < 5 * sqrt(kernels * 5 / 36)).all()


#: NumPy guarantees RandomState's stream.
EXPECTED = [4, 5, 0, 3, 3, 3, 1, 3, 5, 2, 4, 0]


class _Twice(nn.Module):
    """A layer that runs on maps of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = tkn.TargetConv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x)[..., ::2, ::2])


def test_what_cannot_be_fixed() -> None:
    model = tkn.TargetConv2d(1, 2, 3)
    state, size = model.state_dict(), (1, 8, 8)
    with pytest.raises(ValueError, match="unknown places 'centered'; did you mean 'centred'"):
        tkn.fix_rois_(model, state, size, places="centered")
    with pytest.raises(ValueError, match="the network has no layers with ROIs"):
        tkn.fix_rois_(nn.Conv2d(1, 2, 3), state, size)
    with pytest.raises(ValueError, match=r"the ROIs are of another network: loc is not there, or of another shape"):
        tkn.fix_rois_(tkn.TargetConv2d(1, 3, 3), state, size)
    with pytest.raises(ValueError, match=r"the ROIs are of another network: conv\.loc is not there"):
        tkn.fix_rois_(_Twice(), state, size)
    with pytest.raises(ValueError, match=r"conv runs on maps of \(8, 8\) and of \(4, 4\) pixels"):
        tkn.fix_rois_(_Twice(), _Twice().state_dict(), size, places="random")
    with pytest.raises(ValueError, match="has an empty ROI, which has no place"):
        tkn.fix_rois_(model, {**state, "scale": torch.zeros(2, 2)}, size, places="centred")
    coarse = tkn.AttentiveRegularization1d(1, dtype=torch.bfloat16)
    rois = {"loc": torch.tensor([[0.5]]), "scale": torch.tensor([[0.7]])}
    with pytest.raises(ValueError, match=r"torch\.bfloat16 is too coarse for ROIs on maps of \(3000,\) pixels"):
        tkn.fix_rois_(coarse, rois, (1, 3000), places="random")
