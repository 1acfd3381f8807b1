"""Other target layers than those of one rectangle a kernel, through the command: trained, tested again, refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from runs import TINY, metrics_rows, recorded_rois

import tkn
from tkn.adaptive import AdaptiveConv2d, adaptive_layers
from tkn.cli import compose
from tkn.layers import roi_layers
from tkn.several import MixtureConv2d, PartsConv2d
from tkn.training.config import check_config

KINDS = {
    "adaptive": (("attention.adaptive=true",), AdaptiveConv2d),
    "max": (("attention.windows=2",), MixtureConv2d),
    "parts": (("attention.windows=2", "attention.combine=parts"), PartsConv2d),
}


@pytest.mark.usefixtures("empty_pictures")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run(kind: str, tmp_path: Path) -> None:
    options, layer = KINDS[kind]
    network = (*TINY, "model=tdn10", *options)
    train = ("penalty.l2=0.5", "trainer.max_epochs=1")
    summary, objects = tkn.run(compose(*network, *train), tmp_path / "train")
    layers = roi_layers(objects["module"].model)
    assert {type(each) for each in layers.values()} == {layer}
    assert summary["macs_roi"] < summary["macs_dense"]
    windows = 1 if kind == "adaptive" else 2
    assert recorded_rois(tmp_path / "train")["block1.0.layers.conv1.loc"].shape == (2, 2, 12 * windows)
    checkpoint = tmp_path / "train" / "last.ckpt"
    test = ("mode=test", f"checkpoint={checkpoint}")
    tested, _ = tkn.run(compose(*network, *test), tmp_path / "test")
    assert (tested["error"], tested["macs_roi"]) == (summary["error"], summary["macs_roi"])
    model = tkn.load_model(checkpoint)
    images = objects["data"].inputs(objects["data"].test)[:8]
    with torch.no_grad():
        assert torch.allclose(model(images), objects["module"].model.eval()(images), atol=1e-3)  # other memory formats
    with pytest.raises(ValueError, match=r"is of attention\.(adaptive|windows)=\w+, but this run is of attention"):
        tkn.run(compose(*TINY, "model=tdn10", *test), tmp_path / "other")


@pytest.mark.usefixtures("empty_pictures")
def test_multiply_adds_of_adaptive_layers_are_the_mean_over_the_test_images(tmp_path: Path) -> None:
    plain = (*TINY, "data=mnist_moved", "model=tdn10", "penalty.l2=0.5", "trainer.max_epochs=1")
    # What learned static ROIs is a start: its weights are here but for what finds the ROIs of each image.
    tkn.run(compose(*plain), tmp_path / "static")
    weights = f"model.weights={tmp_path / 'static' / 'last.ckpt'}"
    options = (*plain, "attention.adaptive=true", weights)
    summary, objects = tkn.run(compose(*options), tmp_path / "adaptive")
    module = objects["module"]
    images = objects["data"].inputs(objects["data"].test)[:64]  # two batches of 32
    with tkn.ImageRois(module.model.eval()) as rois, torch.no_grad():
        module.model(images)
    counted = tkn.count_macs(module.model, (1, 56, 56), rois)
    assert summary["macs_roi"] == pytest.approx(counted.total_roi, rel=1e-3)
    assert summary["macs_roi"] != tkn.count_macs(module.model, (1, 56, 56)).total_roi
    # Rounding may move a ROI's edge.
    row = metrics_rows(tmp_path / "adaptive")[-1]
    assert float(row["macs_roi"]) == pytest.approx(counted.total_roi, rel=1e-3)
    assert len(adaptive_layers(module.model)) == 6


@pytest.mark.usefixtures("empty_pictures")
def test_adaptive_layers_meet_a_budget_in_the_test_images(tmp_path: Path) -> None:
    budget = ("penalty=budget", "penalty.share=0.6", "attention.adaptive=true", "trainer.max_epochs=2")
    summary, _ = tkn.run(compose(*TINY, "data=mnist_moved", "model=tdn10", *budget), tmp_path / "adaptive")
    assert summary["macs_roi"] == pytest.approx(0.6 * summary["macs_dense"], rel=0.03)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("attention.windows=0", "attention.windows=0 must be a whole number, at least 1"),
        ("attention.windows=1.5", "attention.windows: Value '1.5'"),
        ("attention.windows=2 attention.combine=mx", "attention.combine=mx must be one of max, sum, parts"),
        ("attention.combine=sum", "attention.combine=sum must be max with attention.windows=1"),
        ("attention.windows=2 attention.adaptive=true", "attention.windows=2 must be 1 with attention.adaptive=true"),
        ("attention.adaptive=true engine=roi", "engine=roi must be auto or dense with attention.adaptive=true"),
        ("attention.windows=2 engine=roi", "engine=roi must be auto or dense with attention.combine=max"),
        (
            "attention.windows=2 penalty=budget penalty.share=0.5",
            "must be another than a budget with attention.combine=max",
        ),
        ("attention.adaptive=true trainer.compile=true", "trainer.compile=True must be false with attention.adaptive"),
        ("attention.adaptive=true trainer.devices=2", "trainer.devices=2 must be 1 with attention.adaptive=true"),
        ("+attention.window=2", "unknown key 'attention.window'; did you mean 'attention.windows'"),
    ],
)
def test_what_cannot_be(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_config(compose(*overrides.split()))
