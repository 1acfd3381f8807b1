"""A verdict for every claim of the paper, from made-up runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_runs import config_text, summary_of, write_rois

from tkn.report import figure4, figure5
from tkn.report.claims import claims_table, recorded
from tkn.report.compare import best_pair
from tkn.report.page import fill
from tkn.report.verdicts import CLAIMS, verdicts_table

GPU = {"device": "NVIDIA H200", "versions": {"torch": "2.11.0"}, "precision": "bf16-mixed"}
L2 = {1: (1e-4, 4e-4, 1.6e-3), 2: (5e-5, 2e-4, 8e-4), 4: (2.5e-5, 1e-4, 4e-4)}


def record(folder: Path, model: str, **changes: Any) -> None:
    """A finished run of `model` on MNIST in `folder`, whose configurations are all alike: composing takes long."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_text(f"model={model}", "data=mnist"))
    (folder / "summary.json").write_text(json.dumps(summary_of(model, **{"target_layers": [], **changes})))


def seeds(folder: Path, errors: tuple[float, ...], model: str, **changes: Any) -> None:
    """Runs of one row, with these errors."""
    for seed, error in enumerate(errors):
        record(folder / f"seed{seed}", model, seed=seed, error=error, **changes)


def verdicts(results: Path) -> dict[str, str]:
    """By the claim."""
    lines = [line.strip("| ").split(" | ") for line in verdicts_table(results).splitlines()[2:]]
    return {line[-3]: line[-1] for line in lines}


def test_nothing_was_run(tmp_path: Path) -> None:
    rows = verdicts_table(tmp_path).splitlines()[2:]
    assert len(rows) == len(CLAIMS)
    assert all(row.endswith((" | not run |", " | not tested |")) for row in rows)


LOWER = "TDN10 makes 21 % fewer errors than DN10"


@pytest.mark.parametrize(
    ("targeted", "said"),
    [
        ((0.40, 0.41, 0.42), "0.41 % against 0.49 %: -0.08 ± 0.02 (n = 3, 3) | reproduced |"),
        ((0.60, 0.61, 0.62), "0.61 % against 0.49 %: +0.12 ± 0.02 (n = 3, 3) | not reproduced |"),
        ((0.40, 0.50, 0.60), "0.50 % against 0.49 %: +0.01 ± 0.25 (n = 3, 3) | undecided |"),
        ((0.40,), "0.40 % against 0.49 %: -0.09 (n = 1, 3) | undecided |"),
    ],
)
def test_a_lower_error(tmp_path: Path, targeted: tuple[float, ...], said: str) -> None:
    seeds(tmp_path / "table2_dn10", (0.48, 0.49, 0.50), "dn10")
    seeds(tmp_path / "table2_tdn10_cauchy", targeted, "tdn10")
    (row,) = (line for line in verdicts_table(tmp_path).splitlines() if LOWER in line)
    assert row.endswith(said)


def test_rows_that_were_computed_differently_have_no_verdict(tmp_path: Path) -> None:
    seeds(tmp_path / "table2_dn10", (0.48, 0.49, 0.50), "dn10", **GPU)
    seeds(tmp_path / "table2_tdn10_cauchy", (0.40, 0.41, 0.42), "tdn10")
    (row,) = (line for line in verdicts_table(tmp_path).splitlines() if LOWER in line)
    beside = "32-true x86_64 cpu torch 2.14.1, against bf16-mixed NVIDIA H200 torch 2.11.0"
    assert row.endswith(f"; computed differently: {beside} | undecided |")
    assert f"| {beside} |" in claims_table(2, tmp_path)


def test_runs_on_other_devices_are_rows_of_their_own(tmp_path: Path) -> None:
    """Those that were computed as the other row are taken, though they are fewer; threads make no difference."""
    folder = tmp_path / "table2_dn10"
    for seed, (error, changes) in enumerate(
        [
            (0.4, {}),
            (0.5, {"device": "x86_64 cpu, 1 threads"}),
            (0.7, {**GPU, "precision": "32-true"}),
            (0.8, {**GPU, "precision": "32-true"}),
            (0.9, {**GPU, "precision": "32-true"}),
        ]
    ):
        record(folder / f"seed{seed}", "dn10", seed=seed, error=error, **changes)
    groups = recorded(folder)
    assert sorted((group.seeds, group.label.split(", ")[1:]) for group in groups) == [
        ([0, 1], ["device x86_64 cpu", "torch 2.14.1"]),
        ([2, 3, 4], ["device NVIDIA H200", "torch 2.11.0"]),
    ]
    seeds(tmp_path / "table2_tdn10_cauchy", (0.4,), "tdn10")
    pair = best_pair(recorded(tmp_path / "table2_tdn10_cauchy"), groups)
    assert pair is not None
    assert (pair.alike, pair.other.seeds) == (True, [0, 1])


def test_fewer_multiply_adds(tmp_path: Path) -> None:
    seeds(tmp_path / "table2_tkn6_cauchy", (0.4,), "tkn6", macs_roi=1_000_000)
    assert verdicts(tmp_path)["with 13 times fewer multiply-adds"] == "not reproduced"
    seeds(tmp_path / "other" / "table2_tkn6_cauchy", (0.4,), "tkn6", macs_roi=900_000)
    assert verdicts(tmp_path / "other")["with 13 times fewer multiply-adds"] == "reproduced"


def figure5_runs(results: Path, better: float, count: int = 1, **changes: Any) -> None:
    """Nine points whose error rises with the speed-up, and is so much less for each larger beta."""
    for beta, names in figure5.EXPERIMENTS.items():
        for place, name in enumerate(names):
            for seed in range(count):
                summary = {"penalty": {"l2": L2[beta][place], "beta": float(beta)}, "seed": seed}
                summary |= {"macs_dense": 368_000_000, "macs_roi": 368_000_000 // (2 * 2**place + beta)}
                summary |= {"error": 0.5 + 0.1 * place - better * beta + 0.001 * seed * place, **changes}
                record(results / name / f"seed{seed}", "tkn6", **summary)


@pytest.mark.parametrize(
    ("better", "count", "expected"),
    [(0.1, 3, "reproduced"), (-0.1, 3, "not reproduced"), (0.1, 1, "undecided")],
)
def test_larger_betas(tmp_path: Path, better: float, count: int, expected: str) -> None:
    figure5_runs(tmp_path, better, count)
    found = verdicts(tmp_path)
    assert found["larger β give better trades"] == expected
    assert found["l2 tunes the trade of speed and accuracy"] == "reproduced"


def test_two_lines_at_equal_multiply_adds(tmp_path: Path) -> None:
    """By hand: lines over log multiply-adds from 1 to 4 and 2 to 8 million, both from 0.6 to 0.4 %."""
    names = figure5.EXPERIMENTS
    for beta, least in ((1, 1_000_000), (4, 2_000_000)):
        for name, error, macs in zip(names[beta][:2], (0.6, 0.4), (least, 4 * least), strict=True):
            summary = {"penalty": {"l2": 1e-4, "beta": float(beta)}, "macs_roi": macs, "error": error}
            record(tmp_path / name / "seed0", "tkn6", **summary)
    (trade,) = (trade for trade in figure5.trades(figure5.lines(tmp_path)) if trade.differences)
    assert (trade.smaller, trade.larger) == (1, 4)
    assert trade.differences == pytest.approx([0.1])  # between 2 and 4 million half of the way lies between them


def test_too_few_points_test_nothing(tmp_path: Path) -> None:
    figure5_runs(tmp_path, 0.1)
    for names in figure5.EXPERIMENTS.values():
        for name in names[1:]:
            shutil.rmtree(tmp_path / name)
    assert verdicts(tmp_path)["larger β give better trades"] == "not tested"


def test_figures_are_filled_and_drawn_of_what_is_there(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "results.md"
    text = "<!-- figure 4 -->\n<!-- end -->\n<!-- figure 5 -->\n<!-- end -->\n"
    empty = fill(text, tmp_path, page)
    assert empty.count("not run") == 4 + 9
    assert "**not tested**" in empty
    assert "![" not in empty
    assert not figure4.states(tmp_path)

    figure5_runs(tmp_path, 0.1)
    for name in ("table2_tdn10_cauchy", "figure4_e"):
        seeds(tmp_path / name, (0.5,), "tdn10")
        write_rois(tmp_path / name / "seed0", 2)
    (page.parent / "images").mkdir(parents=True)
    for number in (4, 5):
        (page.parent / "images" / f"results_figure{number}.png").touch()
    filled = fill(text, tmp_path, page)
    assert filled.count("not run") == 2
    assert "(images/results_figure4.png)" in filled
    assert "(images/results_figure5.png)" in filled
    assert fill(filled, tmp_path, page) == filled
    drawn = figure4.figure(figure4.states(tmp_path))
    assert [axis.get_ylabel().split("\n")[0] for axis in drawn.axes[::3]][:3] == ["(a)", "(b)", "(e)"]
