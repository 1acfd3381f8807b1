"""What kernels of several windows, parts, and ROIs that follow the image look at."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import tkn
from tkn import AdaptiveConv2d, MixtureConv2d, PartsConv2d
from tkn.cli import compose
from tkn.layers import roi_layers
from tkn.report.kernels.look import LayerLook, Look, look_at
from tkn.report.kernels.pages import kernel_pages
from tkn.report.kernels.places import inside, kernel_rois, kernel_windows, static_rois
from tkn.report.kernels.responses import largest_responses
from tkn.report.kernels.silencing import silencing_rises
from tkn.report.runs.collect import collect
from tkn.report.runs.groups import sections
from tkn.report.runs.roi_states import layer_title

TINY = (
    "trainer.max_epochs=1",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.accelerator=cpu",
)
DIGITS = (*TINY, "model=tkn6", "data=mnist", "data.source=embedded", "data.limit=64", "recipe.batch_size=32")
KINDS = {
    "mixture": ("attention.windows=2",),
    "parts": ("attention.windows=2", "attention.combine=parts"),
    "adaptive": ("attention.adaptive=true",),
}


@pytest.fixture(scope="module", params=list(KINDS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Look]:
    """A run of each kind, whose ROIs were moved by hand after its training, and its kernels."""
    folder = tmp_path_factory.mktemp(request.param)
    tkn.run(compose(*DIGITS, *KINDS[request.param]), folder / "run")
    (folder / "run" / "rois.npz").unlink(missing_ok=True)
    path = folder / "run" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name, value in content["state_dict"].items():
        if name.endswith((".loc", ".scale")):
            low, high = (0.2, 0.8) if name.endswith("loc") else (0.1, 0.3)
            value.copy_(low + (high - low) * torch.rand(value.shape, generator=generator))
        if name.endswith("locator.saliency.weight"):
            value.copy_(3 * torch.randn(value.shape, generator=generator))
    torch.save(content, path)
    ((found,), _) = collect([folder])
    return request.param, folder, look_at(found, folder, 8, lambda _text: None)


def _passes(folder: Path, look: Look) -> dict[str, tuple[Tensor, Tensor]]:
    """Each layer's input and output of the images, by the checkpoint's network."""
    model, passes = tkn.load_model(folder / "run" / "last.ckpt"), {}
    handles = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: passes.update({name: (inputs[0], output)}))
        for name, layer in roi_layers(model).items()
    ]
    with torch.no_grad():
        model(look.images)
    assert len(handles) == len(passes)
    return passes


def _union(layer: LayerLook, rank: int, kernel: int) -> Tensor:
    mask = torch.zeros(layer.responses.size, dtype=torch.bool)
    for (top, bottom), (left, right) in layer.responses.rois[rank, kernel].tolist():
        mask[top:bottom, left:right] = True
    return mask


def test_each_kind_is_measured(run: tuple[str, Path, Look]) -> None:
    kind, folder, look = run
    model = tkn.load_model(folder / "run" / "last.ckpt")
    passes = _passes(folder, look)
    assert list(look.layers) == list(roi_layers(model))
    for name, layer in roi_layers(model).items():
        shown = look.layers[name]
        input, output = passes[name]
        size, responses = tuple(output.shape[2:]), shown.responses
        kernels = layer.out_channels * (2 if kind == "parts" else 1)
        assert shown.kernels == kernels
        assert responses.rois.shape[2] == (2 if kind == "mixture" else 1)
        if kind == "mixture":
            held = layer.union(size).double()
        elif kind == "parts":
            held = tkn.roi.roi_mask(size, layer.rois(size)).double()
        else:
            rois = layer.image_rois(input)
            assert (rois != rois[:1]).any()
            held = torch.stack([tkn.roi.roi_mask(size, each) for each in rois]).double().mean(dim=0)
        torch.testing.assert_close(shown.coverage(), held.sum(dim=0))
        for kernel in (0, kernels - 1):
            index = int(responses.images[0, kernel])
            row, column = responses.pixels[0, kernel].tolist()
            mask = _union(shown, 0, kernel)
            assert mask[row, column]
            if kind == "adaptive":
                ((top, bottom), (left, right)) = layer.image_rois(input)[index, kernel].tolist()
                assert responses.rois[0, kernel].tolist() == [[[top, bottom], [left, right]]]
            if kind != "parts":
                assert output[:, kernel].amax() == pytest.approx(max(0.0, float(responses.values[0, kernel])), abs=1e-5)
                assert output[index, kernel, row, column] == pytest.approx(float(responses.values[0, kernel]), abs=1e-5)


def test_each_kind_has_a_page(run: tuple[str, Path, Look], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, folder, look = run
    monkeypatch.setattr("tkn.report.kernels.pages.look_at", lambda *_: look)
    monkeypatch.setattr("tkn.report.kernels.pages._SHOWN", 1)
    notes: list[str] = []
    (tmp_path / "figures").mkdir()
    console = Console(file=StringIO())
    ((page, table, *_),) = kernel_pages(sections(collect([folder])[0]), tmp_path, folder, 8, console, notes).values()
    assert notes == []
    text = page.read_text()
    said = {"mixture": "MixtureConv2d. A", "parts": "PartsConv2d, whose", "adaptive": "AdaptiveConv2d, whose"}
    titles = ", ".join(map(layer_title, look.layers))
    assert f"{titles}: {said[kind]}" in text
    assert all(other not in text for other in said.values() if other != said[kind])
    with table.open() as file:
        rows = list(csv.DictReader(file))
    layers = roi_layers(tkn.load_model(folder / "run" / "last.ckpt"))
    assert len(rows) == sum(layer.out_channels * (2 if kind == "parts" else 1) for layer in layers.values())
    assert ("rois" in rows[0]) == (kind == "mixture")
    assert rows[1]["kernel"] == ("0.1" if kind == "parts" else "1")


def _network(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 64, 3)).eval()
    with torch.no_grad():
        layer.loc.uniform_(0.2, 0.8)
        layer.scale.uniform_(0.1, 0.3)
    return model


def test_a_mixtures_kernel_is_inside_the_union_of_its_windows() -> None:
    layer = MixtureConv2d(1, 3, 3, padding=1, windows=3, combine="sum")
    model, images = _network(layer), torch.randn(20, 1, 8, 8)
    assert torch.equal(inside((8, 8), static_rois(layer, (8, 8))), layer.union((8, 8)))
    assert torch.equal(kernel_windows(layer, (8, 8)), layer.mixture((8, 8)).detach())
    (found,) = largest_responses(model, images, {"0": layer}, 2).values()
    outputs = layer(images).detach().masked_fill(~layer.union((8, 8)), -torch.inf)
    assert torch.equal(found.values, outputs.flatten(2).amax(dim=2).topk(2, dim=0).values)


def test_an_adaptive_layers_rois_are_each_images_own() -> None:
    layer = AdaptiveConv2d(1, 3, 3, padding=1)
    model, images = _network(layer), torch.randn(40, 1, 8, 8)
    with torch.no_grad():
        layer.locator.saliency.weight.normal_(std=5)
    rois = kernel_rois(layer, images, (8, 8))
    assert rois.shape == (40, 3, 1, 2, 2)
    (found,) = largest_responses(model, images, {"0": layer}, 2).values()
    for rank in range(2):
        for kernel in range(3):
            assert torch.equal(found.rois[rank, kernel], rois[found.images[rank, kernel], kernel])
    masks = inside((8, 8), rois)
    assert masks.shape == (40, 3, 8, 8)
    assert torch.equal(found.holding, masks.double().mean(dim=0))
    outputs = layer(images).detach().masked_fill(~masks, -torch.inf)
    assert torch.equal(found.values, outputs.flatten(2).amax(dim=2).topk(2, dim=0).values)


def test_parts_are_silenced_one_by_one() -> None:
    layer = PartsConv2d(1, 3, 3, padding=1, windows=2)
    model = _network(layer)
    images, targets = torch.randn(20, 1, 8, 8), torch.arange(20) % 3
    unrolled = layer.unrolled()
    apart = nn.Sequential(unrolled, *model[1:])
    (rises,) = silencing_rises(apart, images, targets, "classification", {"0": unrolled[0]}).values()
    assert sorted(rises) == list(range(6))
    with torch.no_grad():
        before = nn.functional.cross_entropy(model(images), targets)
        layer.weight[3] = 0
        layer.bias[3] = 0
        after = nn.functional.cross_entropy(model(images), targets)
    assert rises[3].loss == pytest.approx(float(after - before), abs=1e-6)
