"""The author's counter on ROIs whose pixels can be counted by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from made_runs import LAYERS, write_rois, write_run

from tkn.report.author_count import author_count, author_pixels
from tkn.report.runs.run import read_run


def test_pixels() -> None:
    # Edges in pixels of 28: -5.8 and 33.8; 2.1 and 25.9; 6.1 and 21.9; 17.3 and 33.1; 12.02 and 15.98.
    loc = torch.tensor([0.5, 0.5, 0.5, 0.9, 0.5])
    scale = torch.tensor([1.0, 0.6, 0.4, 0.4, 0.1])
    sides = [27 - 0 - 1, 26 - 2 - 1, 22 - 6 - 1, 27 - 17 - 1, 16 - 12 - 1]
    squares = author_pixels((28, 28), loc.expand(2, -1), scale.expand(2, -1))
    assert squares.tolist() == [side**2 for side in sides]
    # Each axis has its own edges and length.
    rectangle = author_pixels((28, 7), torch.tensor([[0.9], [0.5]]), torch.tensor([[0.4], [1.0]]))
    assert rectangle.tolist() == [9 * 5]


def test_a_run_of_whole_rois(tmp_path: Path) -> None:
    layers = [
        {"name": name, "map_size": [side, side], "macs_dense": 1000 * side**2, "macs_roi": 900 * side**2}
        for name, side in LAYERS.items()
    ]
    inside = 11_317_030 - sum(100 * side**2 for side in LAYERS.values())
    write_run(tmp_path / "run", target_layers=layers, epochs=2, macs_roi=inside)
    write_rois(tmp_path / "run", 2)
    run = read_run(tmp_path / "run")
    assert run is not None
    shrunk = sum(1000 * (side**2 - pixels) for side, pixels in ((28, 15**2), (28, 15**2), (14, 7**2)))
    assert author_count(run) == pytest.approx(11_317_030 - shrunk, abs=0)
    assert run.summary is not None
    whole = dataclasses.replace(run, summary={**run.summary, "tested": "best", "best_epoch": 0})
    lost = 1000 * (2 * (28**2 - 26**2) + 14**2 - 12**2)
    assert author_count(whole) == pytest.approx(11_317_030 - lost, abs=0)
    parts = {**run.result["attention"], "windows": 3, "combine": "parts"}
    several = dataclasses.replace(run, summary={**run.summary, "attention": parts})
    pixels = 2 * 15**2 + 7**2  # three times as many kernels as the dense layers have
    assert author_count(several) == pytest.approx(author_count(run) + 2 * 1000 * pixels, abs=0)
    missing = dataclasses.replace(run, summary={**run.summary, "tested": "best", "best_epoch": 7})
    with pytest.raises(ValueError, match="has no ROIs of epoch 7"):
        author_count(missing)
