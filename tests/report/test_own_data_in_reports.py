"""Runs on a user's own data in reports: apart from benchmarks, by place; no code of a run's is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import write_run
from own_images import write_folder

from tkn.report.figures.pictures import sample_pictures
from tkn.report.runs.collect import collect
from tkn.report.runs.folds import cross_validated
from tkn.report.runs.groups import sections


def _own(path: str, fold: int) -> dict[str, str]:
    source = f"own: {path}, 6 images to train and 6 to test, 2 classes, fold {fold} of 2, seed 0"
    return {"data": "folder", "data_source": source}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate(("parts", "meter")):
        write_folder(tmp_path / path, {"bad": 6, "good": 6}, size=(16, 16))
        for fold in (0, 1):
            options = (f"data.path={path}", "data.folds=2", f"data.fold={fold}", "data.augment.flip=true")
            write_run(tmp_path / "results" / f"{path}{fold}", *options, error=number + fold / 10, **_own(path, fold))
    options = ("data.path=parts", "data.folds=2", "data.workers=3", "data.memory=1", "data.augment.flip=true")
    write_run(tmp_path / "results" / "parts_again", *options, seed=1, **_own("parts", 0))
    write_run(tmp_path / "results" / "mnist", "data.source=full")
    return tmp_path / "results"


def test_rows_are_apart_by_place_and_not_by_fold(results: Path) -> None:
    runs = collect([results])[0]
    assert [section.title for section in sections(runs)] == ["Whole data sets"]
    rows = cross_validated(runs)
    assert [row.label for row in rows] == [
        f"tdn10 folder cauchy, l2 0.0001, beta 4, path {p}" for p in ("meter", "parts")
    ]
    assert [row.data for row in rows] == [
        f"own: {p}, 12 images, 2 classes, 2 folds, seed 0" for p in ("meter", "parts")
    ]
    # How images were read makes no other row.
    assert [[group.seeds for group in row.folds.values()] for row in rows] == [[[0], [0]], [[0, 1], [0]]]
    assert all(not row.whole.remarks for row in rows)


def test_samples_of_each_place_and_of_no_code(results: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    write_run(results / "python", "data.factory=evil:load", data="python", data_source="own: evil:load (things)")
    notes: list[str] = []
    out = tmp_path / "out"
    out.mkdir()
    runs = [run for run in collect([results])[0] if run.result["data"] != "mnist"]
    pictures = list(sample_pictures(runs, tmp_path / "no_data", out, notes))
    names = [picture.path.name for picture in pictures]
    assert names == ["figure3_tlmnist.png", "figure3_meter.png", "figure3_parts.png"]
    assert "No samples of evil:load: a report runs no code of a run's" in notes
