"""Runs on folds as cross-validated rows: their figures by hand, what is missing, and the pairs fold by fold."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import write_run
from rich.console import Console

from tkn.data.fold_source import Fold, read_fold
from tkn.report.build import build_report
from tkn.report.page import fill
from tkn.report.runs.collect import collect
from tkn.report.runs.folds import CrossValidated, cross_validated, fold_pairs
from tkn.report.runs.groups import sections
from tkn.report.tables.folds import fold_sheets, folds_csv
from tkn.report.tables.sheets import Sheet

#: Test images, and errors of the dense and of the targeted network by seed.
IMAGES = (100, 100, 200)
DENSE = (10.0, 12.0, 17.0)
TARGETED = ((9.0, 12.0, 17.0), (11.0, 13.0, 18.0))
MACS = (3_000_000, 4_000_000, 5_000_000)
OVERLAP = "too narrow rather than too wide"


def _write(folder: Path, fold: int, seed: int = 0, *arguments: str, path: str = "parts", **changes: Any) -> Path:
    """A run on one of three folds of 400 images."""
    images = IMAGES[fold]
    source = f"own: {path}, {400 - images} images to train and {images} to test, 2 classes, fold {fold} of 3, seed 0"
    options = (f"data.path={path}", "data.folds=3", f"data.fold={fold}")
    counts = {"train_images": 400 - images, "test_images": images, "base_model": "dn10"}
    settings = {"data": "folder", "data_source": source, "seed": seed, **counts}
    return write_run(folder / f"fold{fold}seed{seed}", *options, *arguments, **{**settings, **changes})


def _dense(folder: Path, *folds: int, seed: int = 0, epochs: int = 20, **changes: Any) -> None:
    for fold in folds:
        settings = {"model": "dn10", "error": DENSE[fold], "epochs": epochs, **changes}
        _write(folder, fold, seed, "penalty=none", f"recipe.epochs={epochs}", **settings)


def _targeted(folder: Path, *folds: int) -> None:
    for seed, errors in enumerate(TARGETED):
        for fold in folds:
            _write(folder, fold, seed, "recipe.epochs=20", error=errors[fold], macs_roi=MACS[fold])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    _dense(folder / "kfold_dense", 0, 1, 2)
    _targeted(folder / "kfold_targeted", 0, 1, 2)
    return folder


def _rows(folder: Path) -> list[CrossValidated]:
    return cross_validated(collect([folder])[0])


def _cells(sheet: Sheet) -> list[dict[str, str]]:
    return [dict(zip((column.heading for column in sheet.columns), row, strict=True)) for row in sheet.rows]


def test_a_source_tells_of_a_fold() -> None:
    source = "own: a, b/faces, 1,200 faces to train and 300 to test, age (a number), fold 4 of 5, seed 7"
    assert read_fold(source) == Fold(4, 5, "own: a, b/faces, 1,500 faces, age (a number), 5 folds, seed 7")
    for other in ("full", "own: parts, 6 images to train and 6 to test, 2 classes, test_share 0.5, seed 0"):
        assert read_fold(other) is None


def test_folds_form_a_row(results: Path) -> None:
    dense, targeted = _rows(results)
    assert (dense.count, dense.missing, dense.data) == (3, [], "own: parts, 400 images, 2 classes, 3 folds, seed 0")
    # (100 * 10 + 100 * 12 + 200 * 17) / 400; of 10, 12.5 and 17.5, the means over two seeds.
    assert dense.pooled("error") == pytest.approx(14.0)
    assert targeted.values("error") == {0: 10.0, 1: 12.5, 2: 17.5}
    assert targeted.pooled("error") == pytest.approx(14.375)
    sheet, pairs = fold_sheets([dense, targeted])
    assert [row["row"] for row in _cells(sheet)] == ["dn10 folder", "tdn10 folder cauchy, l2 0.0001, beta 4"]
    # Deviation sqrt(13), Student's t of 2 degrees of freedom 4.3027: 4.3027 * 3.6056 / sqrt(3) = 8.957.
    assert _cells(sheet)[0] == {
        **{"row": "dn10 folder", "data": "parts, 400 images, 2 classes, 3 folds, seed 0", "folds": "3", "seeds": "0"},
        **{"error (%) over all folds": "14.00", "95 %": "± 8.96"},
        **{"error (%), lowest to highest fold": "10.00 (fold 0) to 17.00 (fold 2)"},
        **{"multiply-adds": "11.3M", "times fewer": "1.00"},
        **{"precision, device": "32-true, x86_64 cpu, 2 threads", "remarks": ""},
    }
    assert [_cells(sheet)[1][key] for key in ("seeds", "multiply-adds", "times fewer")] == [
        "0, 1",
        "4.00M ± 1.00M",
        "2.83",
    ]
    # Differences 0, 0.5, 0.5: deviation 0.2887, 4.3027 * 0.2887 / sqrt(3) = 0.717.
    assert _cells(pairs) == [
        {
            **{"targeted": "tdn10 folder cauchy, l2 0.0001, beta 4", "dense": "dn10 folder", "folds": "3"},
            **{"error (%): difference by fold": "+0.00, +0.50, +0.50"},
            **{"error (%): mean difference, 95 %": "+0.33 ± 0.72", "trained differently": ""},
        }
    ]
    assert OVERLAP in sheet.note
    assert OVERLAP in pairs.note


def test_a_missing_fold_is_named_and_nothing_is_averaged(results: Path) -> None:
    _dense(results / "other", 0, 2, epochs=5)
    _dense(results / "other", 0, seed=1, epochs=5, error=14.0)
    dense, part, targeted = _rows(results)
    assert (dense.label, part.label) == ("dn10 folder, epochs 20, max_epochs 20", "dn10 folder, epochs 5, max_epochs 5")
    assert (part.missing, part.pooled("error"), part.over_folds("macs_roi")) == ([1], None, None)
    sheet, pairs = fold_sheets([part, dense, targeted])
    row = _cells(sheet)[0]
    assert (row["folds"], row["seeds"]) == ("2 of 3, missing: 1", "fold 0: 0, 1; fold 2: 0")
    assert [row[key] for key in ("error (%) over all folds", "95 %", "multiply-adds", "times fewer")] == [""] * 4
    assert row["error (%), lowest to highest fold"] == "12.00 (fold 0) to 17.00 (fold 2)"
    pair, whole = _cells(pairs)
    assert (pair["folds"], pair["error (%): mean difference, 95 %"]) == ("2 of 3, missing: 1", "")
    assert pair["error (%): difference by fold"] == "-2.00, +0.50"
    assert pair["trained differently"] == "epochs 20 and 5; recipe.epochs 20 and 5"
    assert whole["error (%): mean difference, 95 %"] == "+0.33 ± 0.72"


def test_pairs_are_of_one_base_network_data_set_and_division(tmp_path: Path) -> None:
    _targeted(tmp_path / "targeted", 0, 1, 2)
    _dense(tmp_path / "elsewhere", 0, 1, 2, path="meter")
    _dense(tmp_path / "another_network", 0, 1, 2, base_model="dn40")
    narrowed = {"baseline_macs": 11_317_030, "widths": {}}
    _dense(tmp_path / "narrow", 0, 1, 2, narrowed=narrowed, epochs=4)
    for fold in range(3):
        source = f"own: parts, 300 images to train and 100 to test, 2 classes, fold {fold} of 3, seed 1"
        changes = {"data_source": source, "model": "dn10", "error": 9.0}
        _write(tmp_path / "divided_otherwise", fold, 0, "penalty=none", "data.seed=1", **changes)
    rows = _rows(tmp_path)
    assert len(rows) == 5
    assert not list(fold_pairs(rows))
    assert sum(", data.seed 1" in row.label for row in rows) == 1


def test_runs_that_do_not_say_how_many_images_they_tested_have_no_pooled_error(tmp_path: Path) -> None:
    _dense(tmp_path, 0, 1, 2, test_images=None)
    (row,) = _rows(tmp_path)
    (sheet,) = fold_sheets([row])
    assert row.pooled("error") is None
    assert _cells(sheet)[0]["error (%) over all folds"] == ""
    assert _cells(sheet)[0]["remarks"] == "no error over all folds: a summary.json has no test_images"


def test_a_regression_has_both_errors(tmp_path: Path) -> None:
    for model, shift in (("dn10", 0.0), ("tdn10", 0.25)):
        for fold in range(3):
            arguments = ("penalty=none",) if model == "dn10" else ()
            folder = _write(tmp_path / model, fold, 0, *arguments, model=model, mse=fold + shift, mae=0.5)
            summary = json.loads((folder / "summary.json").read_text())
            del summary["error"]
            (folder / "summary.json").write_text(json.dumps(summary))
    sheet, pairs = fold_sheets(_rows(tmp_path))
    assert sheet.title == "Cross-validation (regression)"
    # Of 400 images 200 in fold 2 have 2 and 100 in fold 1 have 1.
    assert _cells(sheet)[0]["MSE over all folds"] == "1.250"
    assert _cells(sheet)[0]["MSE, lowest to highest fold"] == "0.000 (fold 0) to 2.000 (fold 2)"
    assert _cells(sheet)[0]["MAE, lowest to highest fold"] == "0.500 (fold 0)"
    assert _cells(pairs)[0]["MSE: mean difference, 95 %"] == "+0.250 ± 0.000"
    assert _cells(pairs)[0]["MAE: mean difference, 95 %"] == "+0.000 ± 0.000"


def test_a_report_has_folds_in_tables_of_their_own_alone(results: Path, tmp_path: Path) -> None:
    assert sections(collect([results])[0]) == []
    out = tmp_path / "report"
    console = Console(file=io.StringIO(), width=200)
    written = build_report([results], out, tmp_path, console)
    assert out / "cross_validation.csv" in written
    assert not list(out.glob("figures/figure5*"))
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    for title in ("Cross-validation", "Cross-validation: targeted against dense"):
        assert f"## {title}\n" in text
        assert f">{title}</h2>" in page
    assert "Own data" not in text
    assert (
        "9 runs found, 9 counted in 0 rows of runs that differ only in the seed and 2 rows of runs that differ" in text
    )
    rows, of_runs = (
        list(csv.DictReader(io.StringIO((out / name).read_text()))) for name in ("cross_validation.csv", "runs.csv")
    )
    assert [float(row["error"]) for row in rows] == [14.0, 14.375]
    assert float(rows[0]["error_half"]) == pytest.approx(8.957, abs=1e-3)
    assert rows[1]["error_folds"] == "0:10 1:12.5 2:17.5"
    assert {row["row"] for row in of_runs} == {row["row"] for row in rows}
    assert folds_csv(_rows(results)) == (out / "cross_validation.csv").read_text()
    # A later report on others leaves none.
    write_run(tmp_path / "plain" / "run", "penalty=none", model="dn10")
    build_report([tmp_path / "plain"], out, tmp_path, console)
    assert not (out / "cross_validation.csv").exists()


def test_a_page_has_the_experiments_that_begin_so(results: Path, tmp_path: Path) -> None:
    block = "<!-- folds kfold -->\n<!-- end -->\n"
    page = tmp_path / "docs" / "page.md"
    assert "Not run: no folder other* holds" in fill(block.replace("kfold", "other"), results, page)
    _dense(results / "other_dense", 0, 1, epochs=5)
    filled = fill(block, results, page)
    assert fill(filled, results, page) == filled
    rows = [line for line in filled.splitlines() if line.startswith("| dn10") or line.startswith("| tdn10")]
    assert len(rows) == 3
    assert "| fold 0: [0](../results/kfold_dense/fold0seed0/summary.json); fold 1: [0](" in rows[0]
    assert " | 14.00 | ± 8.96 | " in rows[0]
    assert rows[2].split(" | ")[2:5] == ["3", "+0.00, +0.50, +0.50", "+0.33 ± 0.72"]
    assert filled.count(OVERLAP) == 2
