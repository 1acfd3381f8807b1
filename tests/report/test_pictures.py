"""Figures 2 to 5: what is on them, that it can be read, and the files."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_runs import EMBEDDED, write_rois, write_run
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox
from matplotlib.text import Text
from PIL import Image

from tkn.data import load_data
from tkn.data.base import DataSet
from tkn.drawing.coverage import coverage
from tkn.layers import AttentiveRegularization2d
from tkn.report.figures.animation import save_animation
from tkn.report.figures.attention import attention_functions
from tkn.report.figures.pictures import attention_pictures, sample_pictures
from tkn.report.figures.rois import attention_pages, shown_epochs
from tkn.report.figures.samples import data_samples
from tkn.report.figures.style import save_print
from tkn.report.figures.tradeoff import tradeoff_figure, tradeoff_pages
from tkn.report.figures.tradeoff_points import operations_gain, panels, pareto_front, published_operations
from tkn.report.runs.collect import collect
from tkn.report.runs.groups import sections
from tkn.report.runs.roi_states import RoiStates, read_states
from tkn.report.runs.run import Run, read_run
from tkn.report.timing import time_gain


def _assert_legible(figure: Figure) -> None:
    """No text under 8 points, none beyond the figure's edge."""
    figure.draw_without_rendering()
    edges = figure.bbox
    ticks = {label for axis in figure.axes for label in (*axis.get_xticklabels(), *axis.get_yticklabels())}
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        assert text.get_fontsize() >= 8, text.get_text()
        # Ticks beyond an axis's limits are there, but not drawn.
        if text.get_text().strip() and text.get_visible() and text not in ticks:
            extent = text.get_window_extent()
            assert edges.x0 - 1 <= extent.x0 <= extent.x1 <= edges.x1 + 1, text.get_text()
            assert edges.y0 - 1 <= extent.y0 <= extent.y1 <= edges.y1 + 1, text.get_text()


def _run(folder: Path) -> Run:
    run = read_run(folder)
    assert run is not None
    return run


def _states(layers: int = 2, kernels: int = 12, epochs: int = 4) -> RoiStates:
    scale = torch.linspace(1, 0.3, epochs).reshape(-1, 1, 1).expand(epochs, 2, kernels)
    entry = (torch.full((epochs, 2, kernels), 0.5), scale, (14, 14))
    return RoiStates(list(range(epochs)), {f"block1.{i}.layers.conv1": entry for i in range(layers)}, "cauchy", 0.5)


def test_attention_functions_are_those_of_the_layers() -> None:
    figure = attention_functions()
    curves, *maps = figure.axes[:7]
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["Gaussian", "Cauchy"]  # type: ignore[union-attr]
    assert [text.get_text() for text in curves.texts] == ["0.37", "0.33", "ROI"]
    for name, axis in zip(("gaussian", "cauchy"), (maps[2], maps[5]), strict=True):
        shown = np.asarray(axis.images[0].get_array())
        layer = AttentiveRegularization2d(1, attention=name, scale_unit=0.5)
        np.testing.assert_array_equal(shown, layer.window((28, 28))[0].detach().numpy())
    f_x, f_y, product = (np.asarray(axis.images[0].get_array()) for axis in maps[:3])
    np.testing.assert_allclose(f_x * f_y, product, rtol=1e-6)
    assert "scale_unit 0.5" in figure.get_suptitle()
    _assert_legible(figure)


def test_figures_are_vectors_with_truetype_fonts_and_repeat(tmp_path: Path) -> None:
    first = save_print(attention_functions(), tmp_path, "first")
    second = save_print(attention_functions(), tmp_path, "second")
    png, pdf = (path.read_bytes() for path in first)
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf
    assert b"Type3" not in pdf
    assert [path.read_bytes() for path in second] == [png, pdf]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.pdf", "first.png", "second.pdf", "second.png"]


@pytest.mark.parametrize(
    ("epochs", "columns", "shown"),
    [
        (range(21), 5, [0, 1, 2, 5, 20]),
        (range(21), 3, [0, 2, 20]),
        (range(5), 5, [0, 1, 2, 4]),
        (range(2), 5, [0, 1]),
        ([7], 5, [7]),
    ],
)
def test_shown_epochs(epochs: range, columns: int, shown: list[int]) -> None:
    assert shown_epochs(list(epochs), columns) == shown


def test_attention_maps_stand_by_layer_and_epoch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_rois(run, epochs=6)
    states = read_states(_run(run))
    (figure,) = attention_pages(states, "a title " * 30)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["start", "epoch 1", "epoch 2", "epoch 5", "epoch 6"]
    labels = [axis.get_ylabel().split("\n") for axis in figure.axes if "kernels" in axis.get_ylabel()]
    assert labels[2] == ["block2.0", "conv1", "12 kernels", "14x14"]
    _assert_legible(figure)
    # The first kernel of the first layer: the whole map, at the end 0.4 of it.
    ends = figure.axes[0], figure.axes[4]
    boxes = [next(item for item in axis.collections if isinstance(item, PatchCollection)) for axis in ends]
    widths = [box.get_paths()[0].get_extents().width for box in boxes]
    assert widths == [28, 16]  # 0.4 * sqrt 2 * 28 = 15.8: the 16 centres within it
    mosaic = states.mosaic("block1.0.layers.conv1", 6)
    assert mosaic.boxes[0] == (6, 6, 22, 22)
    assert mosaic.image[13, 13] > 0.9


def test_many_kernels_are_one_map_of_coverage_and_many_layers_more_figures() -> None:
    states = _states(kernels=130, epochs=8)
    (wide,) = attention_pages(states, "title")
    assert [axis.get_title() for axis in wide.axes if axis.get_title()] == [
        "start",
        "epoch 1",
        "epoch 2",
        "epoch 5",
        "epoch 7",
    ]
    assert any(axis.get_ylabel() == "kernels whose ROI covers the pixel" for axis in wide.axes)
    start, *_, end = (np.asarray(axis.images[0].get_array()) for axis in wide.axes[:5])
    assert start.shape == (14, 14)
    assert start.min() == 1
    assert end[7, 7] == 1
    assert end[0, 0] == 0
    pages = attention_pages(_states(layers=8), "title")
    assert [page.get_suptitle() for page in pages] == ["title (1 of 2)", "title (2 of 2)"]
    for page in (*pages, wide):
        _assert_legible(page)


def test_coverage_is_the_share_of_the_kernels() -> None:
    rois = torch.tensor([[[0, 2], [0, 3]], [[1, 2], [2, 4]], [[0, 0], [0, 0]], [[0, 2], [0, 4]]])
    np.testing.assert_array_equal(coverage(rois, (2, 4)), [[0.5, 0.5, 0.5, 0.25], [0.5, 0.5, 0.75, 0.5]])


def test_the_animation_has_a_frame_an_epoch(tmp_path: Path) -> None:
    path = tmp_path / "rois.gif"
    assert save_animation(_states(epochs=4), "a title " * 20, path) == 4
    with Image.open(path) as image:
        assert image.n_frames == 4
        durations, frames = [], []
        for frame in range(4):
            image.seek(frame)
            durations.append(image.info["duration"])
            frames.append(np.asarray(image.convert("RGB")))
    assert durations[-1] > durations[0]
    assert all((first != second).any() for first, second in pairwise(frames))
    orange = (np.abs(frames[0].astype(int) - [213, 94, 0]) < 8).all(axis=2)
    assert orange.sum() > 500


def test_a_long_run_is_animated_in_sixty_frames(tmp_path: Path) -> None:
    assert save_animation(_states(layers=1, kernels=1, epochs=101), "title", tmp_path / "rois.gif") == 60


def test_damaged_roi_histories_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"neither rois\.npz nor last\.ckpt"):
        read_states(_run(folder))
    write_rois(folder, epochs=2)
    content = (folder / "rois.npz").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"text"):
        (folder / "rois.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"rois\.npz is damaged"):
            read_states(_run(folder))
    np.savez(folder / "rois.npz", epochs=np.arange(2), **{"a.size": np.array([3, 3])})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rois\.npz is damaged"):
        read_states(_run(folder))
    (folder / "rois.npz").unlink()
    (folder / "last.ckpt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged or not a checkpoint"):
        read_states(_run(folder))


def test_attention_pictures_are_of_the_lowest_seed_of_each_row(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_rois(write_run(tmp_path / str(seed), seed=seed), epochs=2)
    write_run(tmp_path / "dense", "penalty=none", model="dn10")
    write_run(tmp_path / "without", penalty={"l2": 1e-3, "beta": 1.0})
    notes: list[str] = []
    out = tmp_path / "out"
    out.mkdir()
    pictures = list(attention_pictures(sections(collect([tmp_path])[0]), out, notes))
    assert [picture.path.suffix for picture in pictures] == [".png", ".gif"]
    assert "seed 1" in pictures[0].title
    assert [path.suffix for path in pictures[0].others] == [".pdf"]
    assert len(notes) == 1
    assert "l2 0.001" in notes[0]


def test_samples_have_their_labels() -> None:
    data = load_data("tlmnist", "nowhere", source="embedded")
    figure = data_samples(data)
    titles = [axis.get_title() for axis in figure.axes]
    indices = [999 * i // 13 for i in range(14)]
    assert titles == [str(int(data.test.targets[index])) for index in indices]
    shown = np.asarray(figure.axes[3].images[0].get_array())
    np.testing.assert_allclose(shown * 255, data.test.inputs[0][indices[3], 0], atol=1e-3)
    assert figure.get_suptitle() == "tlMNIST (embedded digits): test images, each with its class"
    _assert_legible(figure)


def test_colour_samples_of_a_small_set() -> None:
    whole = load_data("mnist", "nowhere", source="embedded")
    few = whole.test.select(slice(0, 3))
    colour = replace(few, inputs=(few.inputs[0].expand(-1, 3, -1, -1),), targets=torch.tensor([[0.0], [2.5], [16.0]]))
    data = DataSet("pain", "full", "regression", (3, 28, 28), 1, colour, colour)
    figure = data_samples(data)
    assert [axis.get_title() for axis in figure.axes[:4]] == ["0", "2.5", "16", ""]
    assert np.asarray(figure.axes[0].images[0].get_array()).shape == (28, 28, 3)
    assert figure.get_suptitle().endswith("each with its pain intensity")


def test_samples_are_of_the_runs_data_and_of_tlmnist(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "data.source=embedded", data_source=EMBEDDED)
    write_run(tmp_path / "b", "data.source=full", data="gtsrb", epochs=100)
    runs, _ = collect([tmp_path])
    notes: list[str] = []
    out = tmp_path / "out"
    out.mkdir()
    pictures = list(sample_pictures(runs, tmp_path / "no_data", out, notes))
    assert [picture.path.name for picture in pictures] == ["figure3_tlmnist.png", "figure3_mnist.png"]
    assert [note.split(":")[0] for note in notes] == [
        "The samples of tlmnist are made of other digits than the whole MNIST's",
        "No samples of gtsrb",
    ]


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1.0, 0.5)], [(1.0, 0.5)]),
        # Fewer operations cost accuracy, one is beaten, one is beaten in one only.
        ([(1, 0.5), (2, 0.6), (3, 0.9), (1.5, 0.7), (3, 1.0)], [(1, 0.5), (2, 0.6), (3, 0.9)]),
        # Better in both than all others.
        ([(1, 0.5), (2, 0.4), (4, 0.3)], [(4, 0.3)]),
        ([(2, 0.4), (2, 0.4)], [(2, 0.4)]),
    ],
)
def test_pareto_front(points: list[tuple[float, float]], front: list[tuple[float, float]]) -> None:
    assert pareto_front(points) == front


def _sweep(folder: Path, **changes: Any) -> None:
    write_run(folder / "dense", "penalty=none", model="dn10", error=0.7, **changes)
    for number, (l2, beta, error, macs) in enumerate(
        ((1e-4, 2.0, 0.5, 8_000_000), (5e-4, 2.0, 0.6, 6_000_000), (5e-4, 4.0, 0.61, 5_900_000))
    ):
        for seed in (0, 1):
            name, penalty = f"{number}{seed}", {"l2": l2, "beta": beta}
            run = {"penalty": penalty, "seed": seed, "error": error + 0.02 * seed, "macs_roi": macs, **changes}
            write_run(folder / name, **run)


def test_the_tradeoff_has_a_panel_for_each_data_model_and_source(tmp_path: Path) -> None:
    _sweep(tmp_path / "full")
    partial = f"partial: data.limit=640, trainer.limit_val_batches=2, trainer.limit_test_batches=2 of {EMBEDDED}"
    _sweep(tmp_path / "partial", data_source=partial)
    soft = {"name": "cauchy", "scale_unit": 0.5, "min_size": 3, "clip": False}
    write_run(tmp_path / "full" / "soft", attention=soft, error=0.01, error_clipped=20.0)  # not of one computation
    found = panels(sections(collect([tmp_path])[0]), operations_gain)
    assert [(panel.data, panel.base_model, panel.source) for panel in found] == [
        ("mnist", "dn10", "full"),
        ("mnist", "dn10", partial),
    ]
    assert [len(panel.dense) for panel in found] == [1, 1]
    point = found[0].targeted[0]
    assert point.gain.mean == pytest.approx(11_317_030 / 8_000_000)
    assert point.error.mean == pytest.approx(0.51)
    figure = tradeoff_figure(found, "a title " * 30, "times fewer")
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in axes] == [
        "dn10 on mnist",
        "dn10 on mnist (partial:\ndata.limit=640,\ntrainer.limit_val_batches=2,\n"
        "trainer.limit_test_batches=2 of\nembedded digits)",
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("cauchy, β = 2", "cauchy, β = 4", "dense network", "Pareto front", "numbers: l2"),
    ]
    front = next(line for line in axes[0].lines if len(line.get_xdata()) == 3)
    assert list(front.get_ydata()) == pytest.approx([0.51, 0.61, 0.62])

    labels = [artist.get_window_extent() for artist in axes[0].artists]
    assert len(labels) == 3
    assert not any(one.overlaps(other) for one in labels for other in labels if one is not other)
    _assert_legible(figure)
    assert [page.get_suptitle() for page in tradeoff_pages(found * 3, "t", "x")] == ["t (1 of 2)", "t (2 of 2)"]


def test_the_papers_points_are_hollow_and_one_l2_is_in_the_legend(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", "experiment=table2_dn10", model="dn10", experiment="table2_dn10")
    write_run(tmp_path / "one", "experiment=table2_tdn10_cauchy", experiment="table2_tdn10_cauchy")
    found = panels(sections(collect([tmp_path])[0]), operations_gain, published_operations)
    assert found[0].targeted[0].published == (pytest.approx(11.317030 / 6.26), 0.38)
    figure = tradeoff_figure(found, "a title", "times fewer")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("cauchy, β = 4", "dense network", "hollow: the paper", "l2 = 0.0001"),
    ]
    assert not figure.axes[0].findobj(AnnotationBbox)
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
    assert [list(line.get_ydata()) for line in hollow] == [[0.38], [0.48]]
    _assert_legible(figure)


def test_many_betas_are_written_at_the_points(tmp_path: Path) -> None:
    for seed in range(7):
        beta = 1 + seed / 7
        write_run(
            tmp_path / str(seed),
            penalty={"l2": 0.00123456, "beta": beta},
            error=1.0 + seed / 10,
            macs_roi=8_000_000 - 100_000 * seed,
        )
    figure = tradeoff_figure(panels(sections(collect([tmp_path])[0]), operations_gain), "a title", "times fewer")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["cauchy", "Pareto front", "numbers: l2, β"]
    written = [box.offsetbox.get_text() for box in figure.axes[0].findobj(AnnotationBbox)]
    assert written == [f"0.0012, {1 + seed / 7:.2g}" for seed in range(7)]


def test_budgets_are_told_by_their_shares(tmp_path: Path) -> None:
    write_run(tmp_path / "l2")
    for share, error in ((0.5, 0.6), (0.35, 0.8)):
        asked = round(share * 11_317_030)
        budget = {"share": share, "macs": None, "reach": 0.5, "asked": asked, "met": asked - 1}
        write_run(tmp_path / str(share), penalty=budget, error=error, macs_roi=asked - 1)
    figure = tradeoff_figure(panels(sections(collect([tmp_path])[0]), operations_gain), "a title", "times fewer")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("cauchy, β = 4", "cauchy, budget", "numbers: l2, or the budget's share"),
    ]
    written = [box.offsetbox.get_text() for box in figure.axes[0].findobj(AnnotationBbox)]
    assert sorted(written) == ["0.0001", "0.35", "0.5"]


def test_a_sweep_of_dense_networks_alone_has_no_panel(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", "penalty=none", model="dn10")
    assert panels(sections(collect([tmp_path])[0]), operations_gain) == []
    assert tradeoff_pages([], "title", "x") == []


def test_gains_in_time_are_those_of_the_timed_runs(tmp_path: Path) -> None:
    _sweep(tmp_path / "runs")
    rows = [{"key": "k", "model": "dn10", "folder": None, "macs": 11_317_030, "seconds": {"median": 0.04}}]
    for name, macs, median in (("00", 8_000_000, 0.03), ("01", 8_000_000, 0.02), ("10", 123, 0.01)):
        rows.append(
            {"key": "k", "model": "tdn10", "folder": f"../runs/{name}", "macs": macs, "seconds": {"median": median}}
        )
    gain = time_gain({"rows": rows}, tmp_path / "report")
    (panel,) = panels(sections(collect([tmp_path / "runs"])[0]), gain)
    # The third is of other ROIs than the run has now.
    (point,) = panel.targeted
    assert point.gain.mean == pytest.approx((4 / 3 + 2) / 2)
    assert panel.dense[0].gain.mean == 1
