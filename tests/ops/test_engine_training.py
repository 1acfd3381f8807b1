"""A run of tkn-run by the ROI engine and by torch: the same losses."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import tkn
from tkn.backends.cpu.chain import Chain
from tkn.cli import compose
from tkn.layers import roi_layers

TINY = (
    *("data=mnist", "data.source=embedded", "data.limit=12", "recipe.batch_size=4", "trainer.accelerator=cpu"),
    *("trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "penalty.l2=0.02"),
)


def run(folder: Path, engine: str, *overrides: str) -> tuple[list[dict[str, str]], dict[str, torch.Tensor]]:
    _, objects = tkn.run(compose(*TINY, f"engine={engine}", *overrides), folder)
    with (folder / "metrics.csv").open() as file:
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    layers = roi_layers(objects["module"].model).values()
    assert {layer.engine for layer in layers} == {engine}
    return rows, {name: value.clone() for name, value in objects["module"].model.state_dict().items()}


@pytest.mark.parametrize(("model", "epochs"), [("tkn6", 1), ("tdn10", 2)])
def test_runs_agree(tmp_path: Path, model: str, epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Chain] = []
    forward = Chain.forward
    monkeypatch.setattr(Chain, "forward", lambda self, *args: (calls.append(self), forward(self, *args))[1])
    overrides = (f"model={model}", f"trainer.max_epochs={epochs}", "recipe.optimizer.lr=0.01")
    dense, dense_weights = run(tmp_path / "dense", "dense", *overrides)
    assert not calls
    roi, roi_weights = run(tmp_path / "roi", "roi", *overrides)
    assert calls
    assert len(roi) == len(dense) == epochs
    for ours, theirs in zip(roi, dense, strict=True):
        assert ours["macs_roi"] == theirs["macs_roi"]
        for key in ("train/loss", "test/loss"):
            assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-4)
    for name, weight in dense_weights.items():
        torch.testing.assert_close(roi_weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_the_engines_name_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="engine=rio must be one of auto, dense, roi"):
        tkn.run(compose(*TINY, "engine=rio"), tmp_path)
