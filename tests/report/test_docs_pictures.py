"""The documents' pictures are of the recorded files (docs/images/draw.py)."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from made_runs import write_run

IMAGES = Path(__file__).parents[2] / "docs" / "images"


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw", IMAGES / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_errors_and_times_of_one_benchmark(draw: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "RESULTS", tmp_path)
    for seed, error in enumerate((0.4, 0.6)):
        summary = {"seed": seed, "error": error, "target_layers": []}
        write_run(tmp_path / "table2_dn10" / f"seed{seed}", "experiment=table2_dn10", model="dn10", **summary)
        write_run(tmp_path / "table2_tdn10_cauchy" / f"seed{seed}", "experiment=table2_tdn10_cauchy", seed=seed)
    bench = tmp_path / "bench"
    bench.mkdir()
    macs = {"baseline": 11_317_030, "thinned": 5_050_000, "targeted": 5_000_000}
    row = {"task": "inference", "batch": 128}
    timings = [
        {**row, "network": "baseline", "engine": "openvino", "precision": "float32", "seconds": {"median": 0.03}},
        {**row, "network": "baseline", "engine": "tkn-dense", "precision": "float32", "seconds": {"median": 0.02}},
        {**row, "network": "baseline", "engine": "openvino", "precision": "reduced", "seconds": {"median": 0.01}},
        {**row, "network": "thinned", "engine": "openvino", "failure": "it is not installed"},
        {**row, "network": "targeted", "engine": "tkn", "precision": "float32", "seconds": {"median": 0.004}},
        {**row, "network": "targeted", "engine": "tkn", "batch": 1, "precision": "float32", "seconds": {"median": 1}},
    ]
    networks = [{"kind": kind, "macs": value} for kind, value in macs.items()]
    (bench / "bench.json").write_text(json.dumps({"networks": networks, "timings": timings}))

    dense, thin, targeted = draw.networks(bench, "table2_dn10", "table2_tdn10_cauchy")
    assert dense.error.mean == pytest.approx(0.5)
    assert dense.milliseconds == pytest.approx({"float32": 20, "bfloat16": 10})
    assert (thin.error, thin.milliseconds) == (None, {})
    assert targeted.milliseconds == pytest.approx({"float32": 4})

    summary = {"model": "dn10", "error": 0.7, "macs_roi": 5_000_000, "target_layers": []}
    write_run(tmp_path / "thin" / "seed0", "experiment=table2_dn10", "model.thin=5000000", **summary)
    dense, thin, _ = draw.networks(bench, "table2_dn10", "table2_tdn10_cauchy")
    assert thin.error.mean == 0.7
    assert dense.error.mean == pytest.approx(0.5)


def test_steps_are_drawn_by_what_they_began_with(draw: ModuleType) -> None:
    line, taps, frequencies = draw.steps().axes[0].lines
    assert len(line.get_xdata()) == 14
    assert line.get_xdata()[0] == pytest.approx(368.4, abs=0.1)
    assert line.get_ydata()[-1] < 0.2
    assert taps.get_ydata()[0] == pytest.approx(1.1465)
    assert frequencies.get_ydata()[0] == pytest.approx(0.3677)


def test_figure_5_is_drawn_of_what_is_there(draw: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "RESULTS", tmp_path)
    assert draw.papers_figures() == {}
    for name, macs in (("figure5_beta4_weak", 4_000_000), ("figure5_beta4_middle", 2_000_000)):
        write_run(tmp_path / name / "seed0", model="tkn6", macs_roi=macs, macs_dense=8_000_000, target_layers=[])
    (picture,) = draw.papers_figures().values()
    lines = [line for line in picture.axes[0].lines if len(line.get_xdata()) == 2]
    assert list(lines[0].get_xdata()) == [2, 4]


def test_every_picture_is_there(draw: ModuleType) -> None:
    for name in ("error_against_time", "results_tradeoff", "tkn6_steps", *draw.ROIS):
        assert (IMAGES / f"{name}.png").is_file(), name
    for run, _title in draw.ROIS.values():
        assert (draw.RESULTS / run / "rois.npz").is_file()
