"""Rows of runs, their figures by hand, and the paper's beside them."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import EMBEDDED, write_run

from tkn.cli import compose
from tkn.report.paper import PAPER
from tkn.report.runs.collect import collect
from tkn.report.runs.groups import Section, sections
from tkn.report.tables.formats import groups_csv, markdown_table, runs_csv
from tkn.report.tables.sheets import duration, left_out_sheet, millions, remarks_sheet, result_sheets

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "conf" / "experiment"


def _sections(folder: Path) -> list[Section]:
    return sections(collect([folder])[0])


def _three_seeds(folder: Path, **changes: Any) -> None:
    for seed, error, macs in ((0, 0.4, 5_000_000), (1, 0.5, 6_000_000), (2, 0.9, 7_000_000)):
        write_run(folder / f"seed{seed}", seed=seed, error=error, macs_roi=macs, train_seconds=60.0 * seed, **changes)


def test_runs_with_a_budget_form_a_row_of_their_own(tmp_path: Path) -> None:
    """What their budgets came to is their result, and tells none of them apart."""
    for seed, macs in ((0, 3_960_000), (1, 3_950_000)):
        budget = {"share": 0.35, "macs": None, "reach": 0.5, "asked": 3_960_960, "met": macs}
        write_run(tmp_path / f"budget{seed}", seed=seed, macs_roi=macs, penalty=budget)
    _three_seeds(tmp_path)
    rows = _sections(tmp_path)[0].groups
    assert [(group.label, len(group.runs)) for group in rows] == [
        ("tdn10 mnist cauchy, budget 0.35", 2),
        ("tdn10 mnist cauchy, l2 0.0001, beta 4", 3),
    ]
    # Keys of another penalty are not those of another version.
    assert not [run.remarks for group in rows for run in group.runs if run.remarks]
    table = list(csv.DictReader(io.StringIO(groups_csv(_sections(tmp_path)))))
    assert [row["asked"] for row in table] == ["3960960", ""]


def test_each_seed_may_start_from_the_run_of_its_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        for row in ("dense", "thin"):
            weights = f"model.weights=results/{row}/seed{seed}/last.ckpt"
            write_run(tmp_path / f"{row}{seed}", weights, seed=seed)
    rows = _sections(tmp_path)[0].groups
    assert [(group.label.split(", ")[-1], group.seeds) for group in rows] == [
        (f"weights results/{row}/seed*/last.ckpt", [0, 1]) for row in ("dense", "thin")
    ]


def test_rois_of_other_runs_form_rows_of_their_own(tmp_path: Path) -> None:
    """By their places and by the budget that they were learned with, not by the run that each seed took them from."""
    none, budgets = {"l2": 0.0, "beta": 1.0}, {}
    for share in (0.35, 0.2):
        budgets[share] = {"share": share, "macs": None, "reach": 0.5, "asked": round(share * 11_317_030)}
        write_run(tmp_path / f"learned{share}", penalty={**budgets[share], "met": 3_000_000})
    for share, places, seed in (
        *((0.35, "learned", 0), (0.35, "random", 0), (0.35, "random", 1)),
        *((0.2, "random", 0), (0.2, "centred", 0)),
    ):
        rois = {"places": places, "checkpoint": f"{seed}.ckpt", "data": "mnist", "epochs": 20}
        arguments = (f"rois.checkpoint={seed}.ckpt", f"rois.places={places}")
        for folder, changes in (("plain", {}), ("named", {"experiment": "pays", "epochs": 30})):
            write_run(
                tmp_path / folder / f"{share}{places}{seed}",
                *arguments,
                **{"seed": seed, "penalty": none, "rois": {**rois, "penalty": budgets[share]}, **changes},
            )
    write_run(tmp_path / "whole_maps", penalty=none)
    rows = _sections(tmp_path)[0].groups
    assert sorted((group.label, group.seeds) for group in rows) == [
        ("pays, fixed centred ROIs, budget 0.2", [0]),
        ("pays, fixed learned ROIs, budget 0.35", [0]),
        ("pays, fixed random ROIs, budget 0.2", [0]),
        ("pays, fixed random ROIs, budget 0.35", [0, 1]),
        ("tdn10 mnist cauchy, budget 0.2", [0]),
        ("tdn10 mnist cauchy, budget 0.35", [0]),
        ("tdn10 mnist cauchy, fixed centred ROIs, budget 0.2", [0]),
        ("tdn10 mnist cauchy, fixed learned ROIs, budget 0.35", [0]),
        ("tdn10 mnist cauchy, fixed random ROIs, budget 0.2", [0]),
        ("tdn10 mnist cauchy, fixed random ROIs, budget 0.35", [0, 1]),
        ("tdn10 mnist cauchy, l2 0, beta 1", [0]),
    ]
    assert not [run.remarks for group in rows for run in group.runs if run.remarks]
    table = {row["row"]: row for row in csv.DictReader(io.StringIO(groups_csv(_sections(tmp_path))))}
    row = table["tdn10 mnist cauchy, fixed random ROIs, budget 0.35"]
    assert (row["fixed_rois"], row["asked"]) == ("random", "3960960")
    assert table["tdn10 mnist cauchy, budget 0.35"]["fixed_rois"] == ""


def test_seeds_form_a_row(tmp_path: Path) -> None:
    _three_seeds(tmp_path)
    (section,) = _sections(tmp_path)
    (group,) = section.groups
    assert group.label == "tdn10 mnist cauchy, l2 0.0001, beta 4"
    assert group.seeds == [0, 1, 2]
    error = group.statistic("error")
    assert error is not None
    # mean 0.6; deviations -0.2, -0.1, 0.3: their squares' sum 0.14, over 2
    assert (error.n, error.mean, error.deviation) == (3, pytest.approx(0.6), pytest.approx(0.07**0.5))
    assert group.times_fewer == pytest.approx(11_317_030 / 6_000_000)
    assert group.experiment == "table2_tdn10_cauchy"
    (sheet,) = result_sheets([section])
    (row,) = sheet.rows
    cells = dict(zip((column.heading for column in sheet.columns), row, strict=True))
    assert cells == {
        **{"row": group.label, "n": "3", "seeds": "0, 1, 2"},
        **{"error (%)": "0.60 ± 0.26", "paper's error": "0.38", "difference": "+0.22"},
        **{"lowest error (%) of an epoch": "0.40 ± 0.00", "multiply-adds": "6.00M ± 1.00M"},
        **{"paper's multiply-adds": "6.26M", "from paper's": "-4.2 %", "times fewer": "1.89"},
        **{"parameters": "45,034", "paper's parameters": "45.0K", "training time": "60.0 s", "wall time": "110.0 s"},
        **{"precision, device": "32-true, x86_64 cpu, 2 threads", "remarks": ""},
    }
    assert "| 0.60 ± 0.26 | 0.38 | +0.22 |" in markdown_table(sheet)


def test_one_run_has_no_deviation(tmp_path: Path) -> None:
    write_run(tmp_path / "run", error=0.62)
    (sheet,) = result_sheets(_sections(tmp_path))
    assert "0.62" in sheet.rows[0]
    statistic = _sections(tmp_path)[0].groups[0].statistic("error")
    assert statistic is not None
    assert statistic.deviation is None


def test_other_data_are_never_averaged_in(tmp_path: Path) -> None:
    write_run(tmp_path / "full", seed=0, error=0.5)
    write_run(tmp_path / "embedded", seed=1, error=5.0, data_source=EMBEDDED)
    write_run(tmp_path / "partial", "data.limit=64", seed=2, error=50.0, data_source=f"partial: 64 of {EMBEDDED}")
    found = _sections(tmp_path)
    assert [section.whole for section in found] == [True, False, False]
    assert [[group.seeds for group in section.groups] for section in found] == [[[0]], [[1]], [[2]]]
    assert found[1].groups[0].paper is None
    whole, embedded, partial = result_sheets(found)
    assert "paper's error" in [column.heading for column in whole.columns]
    for sheet in (embedded, partial):
        assert not any("paper" in column.heading for column in sheet.columns)
    assert embedded.title == "Not the whole data set: embedded digits"


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 4},
        {"penalty": {"l2": 2e-4, "beta": 4.0}},
        {"data": "tlmnist"},
        {"data_source": EMBEDDED},
    ],
)
def test_other_settings_do_not_stand_beside_the_paper(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_run(tmp_path / "run", **changes)
    assert _sections(tmp_path)[0].groups[0].paper is None


def test_an_experiment_run_with_other_settings_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "plain", "experiment=table2_tdn10_cauchy", experiment="table2_tdn10_cauchy")
    write_run(
        tmp_path / "fast", "experiment=table2_tdn10_cauchy", "recipe.optimizer.lr=0.2", experiment="table2_tdn10_cauchy"
    )
    fast, plain = sorted(_sections(tmp_path)[0].groups, key=lambda group: group.first.name)
    assert plain.label == "table2_tdn10_cauchy, lr 0.1"
    assert fast.label == "table2_tdn10_cauchy, lr 0.2"
    assert plain.remarks == []
    assert fast.remarks == ["differs from experiment=table2_tdn10_cauchy: recipe.optimizer.lr=0.2, not 0.1"]


def test_rows_are_told_apart_and_ordered(tmp_path: Path) -> None:
    write_run(tmp_path / "a", penalty={"l2": 1e-3, "beta": 2.0}, epochs=4)
    write_run(tmp_path / "b", penalty={"l2": 1e-4, "beta": 2.0}, epochs=4)
    write_run(tmp_path / "c", "penalty=none", model="dn10", epochs=4)
    write_run(tmp_path / "d", "penalty=none", "recipe.batch_size=64", model="dn10", epochs=4)
    (section,) = _sections(tmp_path)
    assert [group.label for group in section.groups] == [
        *("dn10 mnist, batch_size 128", "dn10 mnist, batch_size 64"),
        *("tdn10 mnist cauchy, l2 0.0001, beta 2", "tdn10 mnist cauchy, l2 0.001, beta 2"),
    ]


def test_results_without_a_configuration_are_rows_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, seed=1)
    (tmp_path / "b" / "config.yaml").unlink()
    (section,) = _sections(tmp_path)
    label = "tdn10 mnist cauchy, l2 0.0001, beta 4"
    assert [group.label for group in section.groups] == [label, f"{label}, without config.yaml"]


def test_only_counted_runs_are_in_rows(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, pruned_epoch=2)
    write_run(tmp_path / "c", seed=2, mode="test")
    write_run(tmp_path / "d", seed=0, finished=9)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "summary.json").write_text("{")
    runs, _ = collect([tmp_path])
    (section,) = sections(runs)
    assert section.groups[0].seeds == [0]
    sheet = left_out_sheet(runs)
    assert sheet is not None
    assert [row[1] for row in sheet.rows] == ["pruned", "tested", "duplicate", "damaged"]
    assert left_out_sheet(runs[:1]) is None
    assert remarks_sheet(runs) is None


def test_a_soft_row_has_the_clipped_error_too(tmp_path: Path) -> None:
    attention = {"name": "cauchy", "scale_unit": 0.5, "min_size": 3, "clip": False}
    for seed, clipped in ((0, 0.7), (1, 0.9)):
        write_run(tmp_path / str(seed), seed=seed, attention=attention, error_clipped=clipped)
    (group,) = _sections(tmp_path)[0].groups
    assert group.remarks[0] == "error without clipping to the ROIs; clipped: error 0.80 ± 0.14"
    assert group.remarks[1] == "differs from experiment=table2_tdn10_cauchy: attention.clip=False, not True"


def test_regression_has_both_errors(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "penalty=none", model="dn40", data="pain", epochs=100, mse=1.5, mae=0.45, error=None)
    path = tmp_path / "run" / "summary.json"
    summary = json.loads(path.read_text())
    del summary["error"]
    path.write_text(json.dumps(summary))
    (sheet,) = result_sheets(_sections(tmp_path))
    assert sheet.title == "Whole data sets (regression)"
    assert sheet.rows[0][3:9] == ("1.500", "1.67", "-0.17", "0.450", "0.51", "-0.06")


def test_csv_holds_every_run_and_row(tmp_path: Path) -> None:
    _three_seeds(tmp_path / "three")
    write_run(tmp_path / "pruned", seed=7, pruned_epoch=2)
    runs, _ = collect([tmp_path])
    found = sections(runs)
    rows = list(csv.DictReader(io.StringIO(runs_csv(runs, found[0].groups))))
    assert [row["state"] for row in rows] == ["pruned", "finished", "finished", "finished"]
    assert [row["error"] for row in rows[1:]] == ["0.4", "0.5", "0.9"]
    assert rows[1]["penalty.l2"] == "0.0001"
    assert rows[1]["row"] == found[0].groups[0].label
    (row,) = csv.DictReader(io.StringIO(groups_csv(found)))
    assert (row["n"], row["seeds"], row["paper_error"], row["paper_macs"]) == ("3", "0 1 2", "0.38", "6260000")
    assert float(row["error_mean"]) == pytest.approx(0.6)
    assert float(row["error_sd"]) == pytest.approx(0.2645751)


def test_a_cell_cannot_break_a_markdown_table(tmp_path: Path) -> None:
    write_run(tmp_path / "run", device="a | b\nc")
    (sheet,) = result_sheets(_sections(tmp_path))
    text = markdown_table(sheet)
    assert "a \\| b c" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(24_298, "0.024M"), (5_955_046, "5.96M"), (28.2e6, "28.2M"), (368.4e6, "368M"), (1.47e9, "1470M")],
)
def test_millions(value: float, text: str) -> None:
    assert millions(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(34.26, "34.3 s"), (1651.39, "27.5 min"), (9000, "2.5 h")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_every_experiment_of_a_table_is_in_the_paper() -> None:
    assert set(PAPER) == {path.stem for path in EXPERIMENTS.glob("table*.yaml")}


@pytest.mark.parametrize("experiment", PAPER)
def test_the_paper_is_what_the_experiments_say(experiment: str) -> None:
    row = PAPER[experiment]
    comments = [
        line.removeprefix("# ")
        for line in (EXPERIMENTS / f"{experiment}.yaml").read_text().splitlines()
        if line.startswith("# ")
    ]
    assert comments[:3] == ["@package _global_", f"tkn-run experiment={experiment}", str(row)]
    config = compose(f"experiment={experiment}")
    assert (config.model.name, config.data.name, config.trainer.max_epochs) == (row.model, row.data, row.epochs)
    if row.attention:
        settings = (config.attention.name, config.penalty.l2, config.penalty.beta)
        assert settings == (row.attention, row.l2, row.beta)
    else:
        assert config.penalty.l2 == 0
