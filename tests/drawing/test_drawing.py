"""Tables and figures of a run, from known models."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import PatchCollection
from matplotlib.image import imread
from rich.console import Console

from tkn import build_model, count_macs
from tkn.drawing.figures import attention_maps, save_figure, training_curves
from tkn.drawing.tables import layers_table, results_table
from tkn.layers import roi_layers


def _text(renderable: object) -> str:
    console = Console(width=120, record=True, file=StringIO())
    console.print(renderable)
    return console.export_text()


def test_attention_maps_show_windows_and_rois() -> None:
    model = build_model("tdn10", (1, 8, 8), 10, min_size=2)
    layers = roi_layers(model)
    sizes = {name: (8, 8) if "block1" in name else (4, 4) if "block2" in name else (2, 2) for name in layers}
    first = next(iter(layers.values()))
    with torch.no_grad():
        first.loc[:, 0], first.scale[:, 0] = torch.tensor([0.25, 0.75]), 0.25
    figure = attention_maps(model, sizes, "title")
    axes = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title().split("\n")[0] for axis in axes] == list(layers)
    grid = np.asarray(axes[0].images[0].get_array())
    np.testing.assert_allclose(grid[:8, :8], first.window((8, 8))[0].detach().numpy())
    (boxes,) = (item for item in axes[0].collections if isinstance(item, PatchCollection))
    (top, bottom), (left, right) = first.rois((8, 8))[0].tolist()
    corners = boxes.get_paths()[0].get_extents()
    assert (corners.x0, corners.y0, corners.x1, corners.y1) == (left - 0.5, top - 0.5, right - 0.5, bottom - 0.5)
    assert len(boxes.get_paths()) == 12


def test_attention_maps_need_a_target_layer() -> None:
    with pytest.raises(ValueError, match="no target layer"):
        attention_maps(build_model("dn10", (1, 8, 8), 10), {}, "title")


def test_training_curves_draw_every_metric(tmp_path: Path) -> None:
    rows = [
        {"epoch": e, "train/loss": 1 / e, "train/error": 10 / e, "test/loss": 2 / e, "test/error": 0, "macs_roi": 5e6}
        for e in (1, 2, 3)
    ]
    rows = [rows[0], *({**row, "step_seconds": 0.25} for row in rows[1:])]  # continued from before steps were timed
    figure = training_curves(rows, "error", 10_000_000, "title")
    loss, error, macs, step = figure.axes
    assert [line.get_label() for line in loss.lines] == ["train/loss", "test/loss"]
    assert [line.get_label() for line in error.lines] == ["train/error", "test/error"]
    assert list(macs.lines[0].get_ydata()) == [5, 5, 5]
    assert step.lines[0].get_xydata().tolist() == [[5, 250], [5, 250]]
    save_figure(figure, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").std() > 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_layers_table_holds_every_count() -> None:
    report = count_macs(build_model("tdn10", (1, 28, 28), 10), (1, 28, 28))
    text = _text(layers_table(report, "tdn10 on q[/x]"))
    assert "tdn10 on q[/x]" in text
    for row in report.target_layers:
        assert row.name in text
        assert f"{row.macs_roi:,}" in text
    assert "11,317,030" in text
    assert "9 layers" in text


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"error": 0.4}, "0.400 %"),
        ({"error": 0.4, "error_clipped": 0.52}, "0.520 %"),
        ({"mse": 1.67, "mae": 0.5}, "1.670"),
    ],
)
def test_results_table(figures: dict[str, float], expected: str) -> None:
    summary = {
        **{"model": "net[b]", "data": "mnist", "seed": 0, "parameters": 45_034, "macs_dense": 12_000_000},
        **{"macs_roi": 5_000_000, "epochs": 20, "wall_seconds": 12.34, "data_source": "own: q[/x]"},
        **figures,
    }
    text = _text(results_table(summary))
    for part in (expected, "45,034", "2.40", "12.3 s", "net[b] on mnist", "own: q[/x]"):
        assert part in text
