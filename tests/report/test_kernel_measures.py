"""Largest responses, silenced kernels, and windows on a face, each held against the plain way to compute it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from own_images import face_rows, write_faces
from torch import Tensor, nn
from torch.nn import functional as F

from tkn import AttentiveRegularization2d, TargetConv2d
from tkn.data import load_data
from tkn.data.face import PAIN_FACE, FaceWarp, WarpFaces
from tkn.layers import roi_layers
from tkn.report.kernels.face_parts import PARTS, mass_shares, part_masks, reference_points
from tkn.report.kernels.responses import largest_responses
from tkn.report.kernels.silencing import CANDIDATES, expected_changes, silencing_rises
from tkn.sequential import TargetSequential


def _network(kernels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = TargetSequential(
        TargetConv2d(1, kernels, 3, padding=1, engine="dense"),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(kernels * 64, 3),
    )
    layer = model[0]
    with torch.no_grad():
        layer.loc.uniform_(0.2, 0.8)
        layer.scale.uniform_(0.2, 0.5)
    return model.eval()


def test_the_largest_responses_are_those_inside_the_roi() -> None:
    model = _network()
    layer, images = model[0], torch.randn(150, 1, 8, 8)
    (found,) = largest_responses(model, images, roi_layers(model), 3).values()
    output = layer(images).detach()
    assert found.size == (8, 8)
    for kernel, ((top, bottom), (left, right)) in enumerate(layer.rois((8, 8)).tolist()):
        values = output[:, kernel, top:bottom, left:right].flatten(1).max(dim=1)[0]
        expected = values.sort(descending=True)
        assert torch.equal(found.images[:, kernel], expected.indices[:3])
        assert torch.equal(found.values[:, kernel], expected.values[:3])
        for rank in range(3):
            index, (row, column) = found.images[rank, kernel], found.pixels[rank, kernel].tolist()
            assert top <= row < bottom
            assert left <= column < right
            assert output[index, kernel, row, column] == found.values[rank, kernel]
            assert found.rois[rank, kernel].tolist() == [[[top, bottom], [left, right]]]
        inside = torch.zeros(8, 8, dtype=torch.float64)
        inside[top:bottom, left:right] = 1
        assert torch.equal(found.holding[kernel], inside)
    assert not layer._forward_hooks


def test_fewer_images_than_asked_for() -> None:
    model = _network()
    (found,) = largest_responses(model, torch.randn(2, 1, 8, 8), roi_layers(model), 6).values()
    assert found.images.shape == (2, 4)


def _rise(model: nn.Module, images: Tensor, targets: Tensor, kernel: int) -> tuple[float, float]:
    """By a network whose kernel's weights are zero."""
    figures = []
    weight, bias = model[0].weight.data.clone(), model[0].bias.data.clone()
    for silenced in (False, True):
        with torch.no_grad():
            if silenced:
                model[0].weight[kernel] = 0
                model[0].bias[kernel] = 0
            output = model(images)
        wrong = (output.argmax(dim=1) != targets).double().mean()
        figures.append((100 * wrong.item(), F.cross_entropy(output, targets).item()))
    model[0].weight.data.copy_(weight)
    model[0].bias.data.copy_(bias)
    return figures[1][0] - figures[0][0], figures[1][1] - figures[0][1]


def test_a_silenced_kernel_is_one_without_weights() -> None:
    model = _network()
    images, targets = torch.randn(150, 1, 8, 8), torch.arange(150) % 3
    (rises,) = silencing_rises(model, images, targets, "classification", roi_layers(model)).values()
    assert sorted(rises) == [0, 1, 2, 3]
    for kernel, rise in rises.items():
        assert (rise.error, rise.loss) == pytest.approx(_rise(model, images, targets, kernel), abs=1e-5)
    errors = [(rise.error, rise.loss) for rise in rises.values()]
    assert errors == sorted(errors, reverse=True)


def test_of_many_kernels_those_are_silenced_that_the_gradients_name() -> None:
    model = _network(CANDIDATES + 8)
    images, targets = torch.randn(40, 1, 8, 8), torch.arange(40) % 3
    with torch.no_grad():
        model[3].weight.view(3, CANDIDATES + 8, 64)[:, 5] *= 10
        model[3].weight.view(3, CANDIDATES + 8, 64)[:, 8:16] = 0  # what nothing reads
    layers = roi_layers(model)
    (changes,) = expected_changes(model, images, targets, "classification", layers).values()
    assert changes.argmax() == 5
    assert (changes[8:16] == 0).all()
    (rises,) = silencing_rises(model, images, targets, "classification", layers).values()
    assert set(rises) == {*range(8), *range(16, CANDIDATES + 8)}
    # Nearly linear: silenced, each image's loss changes as the gradients say.
    model[3].weight.data.mul_(1e-3)
    (changes,) = expected_changes(model, images[:1], targets[:1], "classification", layers).values()
    for kernel in (0, 5, 20):
        loss = abs(_rise(model, images[:1].double().float(), targets[:1], kernel)[1])
        assert float(changes[kernel]) == pytest.approx(loss, rel=0.05, abs=2e-6)


def test_a_regression_has_squared_errors() -> None:
    model = _network()
    images, targets = torch.randn(20, 1, 8, 8), torch.randn(20, 3)
    before = F.mse_loss(model(images), targets).item()
    (rises,) = silencing_rises(model, images, targets, "regression", roi_layers(model)).values()
    assert all(rise.error == pytest.approx(rise.loss) for rise in rises.values())
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 0
    assert rises[2].error == pytest.approx(F.mse_loss(model(images), targets).item() - before, abs=1e-6)


def test_where_windows_lie_on_a_face() -> None:
    masks = part_masks(PAIN_FACE.points)
    areas = {name: float(mask.double().mean()) for name, mask in masks.items()}
    assert list(masks) == list(PARTS)
    assert all(0.005 < area < 0.2 for area in areas.values())
    layer = AttentiveRegularization2d(5, attention="flat", min_size=1)
    with torch.no_grad():
        for kernel, part in enumerate(((36, 42), (27, 36), (48, 60), (17, 22))):
            x, y = PAIN_FACE.points[slice(*part)].mean(dim=0).tolist()
            layer.loc[:, kernel] = torch.tensor([y, x])
            layer.scale[:, kernel] = 0.01
    shares = mass_shares(layer, masks)
    for kernel, part in enumerate(("eyes", "nose", "mouth", "brows")):
        assert {name: share[kernel].item() for name, share in shares.items()} == {
            **dict.fromkeys(PARTS, 0.0),
            part: 1.0,
        }
    # The last one's ROI is the whole face; flat windows fall off at the edges alone.
    for name, share in shares.items():
        assert share[4].item() == pytest.approx(areas[name], rel=0.25)


def test_only_numbered_landmarks_have_parts(tmp_path: Path) -> None:
    data = load_data("pain_synthetic", tmp_path, subjects=2, sequences=1, frames=2, test_subjects=1)
    assert torch.equal(reference_points(data), PAIN_FACE.points)
    other = load_data("faces", tmp_path, path=str(write_faces(tmp_path / "f", face_rows(8))), target="mood", size=16)
    assert isinstance(other.to_input, WarpFaces)
    assert reference_points(other) is None
    more = replace(PAIN_FACE, points=torch.rand(68, 2), mirror=None)
    assert reference_points(replace(other, to_input=WarpFaces(0, False, FaceWarp(16, more)))) is more.points
    assert reference_points(load_data("mnist", tmp_path, source="embedded")) is None
