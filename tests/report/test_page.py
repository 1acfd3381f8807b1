"""Pages whose tables are filled with recorded runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from made_runs import LAYERS, write_rois, write_run
from omegaconf import OmegaConf

from tkn.cli import compose
from tkn.report.claims import claims_table
from tkn.report.compare import difference
from tkn.report.page import fill, main
from tkn.report.runs.groups import Statistic

ROOT = Path(__file__).parents[2]
PAGE = "# Results\n\n<!-- paper 2 -->\nold\n<!-- end -->\n\nbetween\n\n<!-- runs factors -->\n<!-- end -->\n"
HEADINGS = "error (%) | 95 % | multiply-adds | n | seeds |"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    layers = [
        {"name": name, "map_size": [side, side], "macs_dense": 1000 * side**2, "macs_roi": 900 * side**2}
        for name, side in LAYERS.items()
    ]
    arguments = ("experiment=table2_tdn10_cauchy", "trainer=fast")
    for seed, error in ((0, 0.4), (1, 0.6)):
        run = write_run(
            folder / "table2_tdn10_cauchy" / f"seed{seed}",
            *(*arguments, "data_dir=elsewhere"),
            **{"seed": seed, "error": error, "experiment": "table2_tdn10_cauchy", "target_layers": layers},
        )
        write_rois(run, 20)
    soft = {"name": "cauchy", "scale_unit": 0.5, "min_size": 3, "clip": False}
    run = write_run(
        folder / "factors" / "clip_off" / "seed3",
        *("experiment=table2_tdn10_cauchy", "recipe.weight_decay_as=keras"),
        **{"seed": 3, "attention": soft, "error_clipped": 7.125, "target_layers": layers},
    )
    write_rois(run, 20)
    return folder


def test_tables_of_the_paper_and_of_other_runs(results: Path, tmp_path: Path) -> None:
    lines = fill(PAGE, results, tmp_path / "docs" / "results.md").splitlines()
    assert lines[:5] == [
        *("# Results", "", "<!-- paper 2 -->", ""),
        f"| row | paper's error (%) | paper's multiply-adds | {HEADINGS}",
    ]
    rows: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("| "):
            rows.setdefault(line.split(" | ")[0], []).append(line)
    device = "32-true, x86_64 cpu, 2 threads"
    assert rows["| TDN10, Cauchy, 0.0001, β = 4"] == [
        "| TDN10, Cauchy, 0.0001, β = 4 | 0.38 | 6.26M | 0.50 ± 0.14 | ± 1.27 | 5.00M | 2 | "
        "[0](../results/table2_tdn10_cauchy/seed0/summary.json), "
        "[1](../results/table2_tdn10_cauchy/seed1/summary.json) |",
        f"| TDN10, Cauchy, 0.0001, β = 4 | 0.40 ± 0.00 | 3.91M | {device} | 110.0 s | "
        "`tkn-run -m experiment=table2_tdn10_cauchy trainer=fast seed=0,1` |",
    ]
    assert rows["| CNN6"] == ["| CNN6 | 0.42 | 368M | not run |  |  |  |  |"]
    assert rows["| clip_off"] == [
        "| clip_off | 0.50 (clipped: 7.12) |  | 5.00M | 1 | [3](../results/factors/clip_off/seed3/summary.json) |",
        f"| clip_off | 0.40 | 3.91M | {device} | 110.0 s | "
        "`tkn-run experiment=table2_tdn10_cauchy recipe.weight_decay_as=keras attention.clip=false seed=3` |",
    ]
    assert "old" not in lines
    assert "between" in lines


def test_runs_tested_with_their_best_epoch_on_held_out_images(tmp_path: Path) -> None:
    row = "experiment=table2_tdn10_cauchy"
    begins = (("data.source=full", "recipe.epochs=20"), (row,))
    for seed, arguments in enumerate(begins):
        run = write_run(
            tmp_path / "runs" / "better" / "held_out" / f"seed{seed}",
            *(*arguments, "data.validation=9"),
            **{"seed": seed, "tested": "best", "best_chosen_on": "valid", "best_error": 0.3, "target_layers": []},
        )
        write_rois(run, 20)
    lines = fill("<!-- runs better -->\n<!-- end -->", tmp_path / "runs", tmp_path / "page.md").splitlines()
    shown, folded = (line for line in lines if line.startswith("| held_out"))
    assert shown.startswith("| held_out | 0.50 ± 0.00 | ± 0.00 | ")
    assert folded.startswith("| held_out | 0.30 ± 0.00 (held-out images) | ")
    assert folded.endswith(f"| `tkn-run -m {row} data.validation=9 seed=0,1` |")


def test_claims_have_the_interval_of_the_difference(results: Path) -> None:
    for seed, error in enumerate((0.45, 0.5, 0.55)):
        arguments = ("experiment=table2_dn10", "trainer=fast")
        summary = {"seed": seed, "error": error, "experiment": "table2_dn10", "target_layers": []}
        write_run(results / "table2_dn10" / f"seed{seed}", *arguments, model="dn10", **summary)
    rows = [line for line in claims_table(2, results).splitlines() if line.startswith("| T")]
    assert rows[2] == (
        "| TDN10, Gaussian, 0.0001, β = 2, against DN10 | 0.42 against 0.48 %, 1.6 times fewer | not run |  |  |  |  |"
    )
    # Welch's t-test of [0.4, 0.6] against [0.45, 0.5, 0.55]: 0.1041 by 1.17 degrees of freedom.
    assert rows[3].endswith(" | 0.50 against 0.50 %, 2.3 times fewer | +0.00 ± 0.95 | 2, 3 | not shown |  |")


def test_runs_against_those_of_another_folder(results: Path, tmp_path: Path) -> None:
    for seed, error in enumerate((0.45, 0.5, 0.55)):
        summary = {"seed": seed, "error": error, "experiment": "table2_dn10", "target_layers": []}
        write_run(results / "table2_dn10" / f"seed{seed}", "experiment=table2_dn10", model="dn10", **summary)
    page = tmp_path / "page.md"
    text = "<!-- against table2_dn10,table2_tdn10_cauchy,table2_tkn6 -->\n<!-- end -->"
    shown = [line.split(" | ") for line in fill(text, results, page).splitlines() if "summary.json" in line]
    assert [row[0] for row in shown] == ["| table2_dn10", "| table2_tdn10_cauchy"]
    assert shown[0][-2:] == ["", " |"]
    assert shown[1][-2:] == ["44 %", "+0.00 ± 0.95 |"]
    assert "| table2_tkn6 | not run |  |  |  |  |  |  |" in fill(text, results, page)
    alone = fill("<!-- against table2_tkn6,table2_dn10 -->\n<!-- end -->", results, page).splitlines()
    assert next(line for line in alone if "summary.json" in line).endswith(") |  |  |")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [((0.2, 0.3, 0.4), (0.6, 0.7, 0.8), (-0.4, 0.2267)), ((0.2,), (0.6, 0.7), (-0.45, None))],
)
def test_differences(one: tuple[float, ...], other: tuple[float, ...], expected: tuple[float, float | None]) -> None:
    between, half = difference(Statistic.of(one), Statistic.of(other))
    assert between == pytest.approx(expected[0])
    assert half is None if expected[1] is None else half == pytest.approx(expected[1], abs=1e-4)


def test_filling_twice_changes_nothing(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    main([str(results), str(page)])
    once = page.read_text()
    main([str(results), str(page)])
    assert page.read_text() == once != PAGE


@pytest.mark.parametrize("name", ["results", "beyond"])
def test_the_pages_are_of_the_recorded_runs(name: str) -> None:
    page = ROOT / "docs" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    assert fill(text, ROOT / "results", page) == text


@pytest.mark.parametrize(
    "arguments",
    [
        ("recipe.optimizer.name=Adam", "~recipe.optimizer.momentum", "~recipe.optimizer.nesterov"),
        ("recipe.lr_drops=[0.3,0.6]", "+recipe.optimizer.dampening=0.5", "trainer.gradient_clip_val=null"),
        ("recipe.ema_decay=0.99", "trainer.compile=true", "trainer.precision=bf16-mixed", "data.limit=7"),
    ],
)
def test_a_printed_command_makes_the_same_configuration(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    run = write_run(tmp_path / "runs" / "one" / "seed0", "model=tkn6", *arguments, target_layers=[])
    write_rois(run, 20)
    lines = fill("<!-- runs one -->\n<!-- end -->", tmp_path / "runs", tmp_path / "page.md").splitlines()
    (written,) = (line for line in lines if "`" in line)
    command = shlex.split(written.split("`")[1])
    assert command[0] == "tkn-run"
    composed = OmegaConf.to_container(compose(*command[1:]), resolve=True)
    assert composed == OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))


def test_errors_are_one_line(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text, message in (
        ("<!-- paper 7 -->\n<!-- end -->", "the paper has no error rates in a Table 7"),
        ("<!-- paper 6 -->\n<!-- end -->", "the paper has no error rates in a Table 6"),
        ("<!-- paper 2 -->\nprose\n<!-- runs factors -->\n<!-- end -->", "paper 2 --> has no end before the next"),
        ("<!-- figure 3 -->\n<!-- end -->", "there are Figures 4 and 5 of runs, not 3"),
        ("<!-- runs other -->\n<!-- end -->", "other does not exist"),
    ):
        page.write_text(text)
        with pytest.raises(SystemExit, match=message):
            main([str(results), str(page)])
        assert page.read_text() == text
    (results / "factors" / "clip_off" / "seed3" / "config.yaml").unlink()
    page.write_text(PAGE)
    with pytest.raises(SystemExit, match=r"seed3 has no config\.yaml"):
        main([str(results), str(page)])


def test_the_results_page_is_that_of_the_results() -> None:
    page = ROOT / "docs" / "results.md"
    text = page.read_text(encoding="utf-8")
    assert fill(text, ROOT / "results", page) == text
    linked = set(re.findall(r"\]\(\.\./(results/\S+/summary\.json)\)", text))
    assert linked
    for path in linked:
        source = json.loads((ROOT / path).read_text())["data_source"]
        copies = r" \(\S+ of \S+ images are copies rescaled to 32x32\)"
        assert re.fullmatch(rf"full({copies})?|own: .+, fold \d of \d, seed \d+", source)
