"""The page of the comparison, filled from made-up results by its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made_pays import ERRORS, THIRD, WHOLE, write_pays_run, write_set, write_timings

from tkn.report.pays.__main__ import main
from tkn.report.pays.design import SETS
from tkn.report.pays.page import FIGURE, fill
from tkn.report.pays.study import read_study

ROOT = Path(__file__).parents[2]
PAGE = "# Pays\n\n" + "\n".join(f"<!-- pays {name} -->\nold\n<!-- end -->\n" for name in ("verdicts", "figure", *SETS))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "pays.md").write_text(PAGE)
    return tmp_path / "results"


def _filled(results: Path) -> dict[str, str]:
    """The blocks by name."""
    page = results.parent / "docs" / "pays.md"
    text = fill(PAGE, read_study(results, results.parent / "timings"), page)
    parts = [part.split(" -->\n", 1) for part in text.split("<!-- pays ")[1:]]
    return {name: block.split("<!-- end -->")[0] for name, block in parts}


def test_verdicts_arms_and_secondary_differences(results: Path) -> None:
    write_set(results, "casting")
    blocks = _filled(results)
    assert not any("\nold\n" in block for block in blocks.values())
    rows = [line for line in blocks["verdicts"].splitlines() if line.startswith("| castings, 96x96: small")]
    assert rows == [
        "| castings, 96x96: small CNN | error, % | 0.50 ± 0.05 | pruned: 0.62 ± 0.05 | 0.53 ± 0.04 | -0.09 ± 0.04 | "
        "3, 3 | 0.005 | 0.005 | **ahead** |  |"
    ]
    assert "CNN6" not in blocks["verdicts"]
    assert "ahead: casting; not run: meter, " in blocks["verdicts"]
    assert "Holm's correction is for 1 set." in blocks["verdicts"]
    casting = blocks["casting"].splitlines()
    links = ", ".join(f"[{seed}](../results/pays_casting_thin/seed{seed}/summary.json)" for seed in range(3))
    assert (
        f"| thin: every layer narrower | 0.72 ± 0.05 | 3 | 3.77M | 33.3 % | not timed | not timed | {links} |"
    ) in casting
    assert [line.split(" | ")[0] for line in casting if line.startswith("| ") and " - " in line] == [
        *("| targeted - dense", "| converted - pruned", "| targeted - centred", "| targeted - random"),
    ]
    computed = "| pays_casting_pruned | bf16-mixed, x86_64 cpu, 2 threads | 2.14.1 | 20 | 110.0 s | unknown |"
    assert computed in casting
    assert blocks["gtsrb"] == "\nNot run: there are no folders pays_gtsrb_* of finished runs.\n\n"


def test_an_undecided_difference_says_how_far_apart_at_most(results: Path) -> None:
    write_set(results, "faces", errors={**ERRORS, "targeted": (0.5, 0.7, 0.6)})
    (row,) = (line for line in _filled(results)["verdicts"].splitlines() if line.startswith("| age"))
    assert "| pruned: 0.62 ± 0.05 | 0.60 ± 0.25 | -0.02 ± 0.24 | 3, 3 | " in row
    assert row.endswith(" | **undecided** | not more than 0.26 apart |")


def test_runs_of_a_row_that_differ_are_named_and_not_averaged(results: Path) -> None:
    write_set(results, "casting")
    folder = "casting_thin"
    write_pays_run(results, folder, 3, 9.0, "trainer.precision=32-true", precision="32-true")
    write_pays_run(results, folder, 4, 9.0, device="NVIDIA H200")
    write_pays_run(results, folder, 5, 9.0, versions={"torch": "2.11.0"})
    write_pays_run(results, folder, 6, 9.0, "recipe.optimizer.lr=0.2")
    write_pays_run(results, folder, 7, 9.0).joinpath("summary.json").unlink()
    write_pays_run(results, folder, 8, 9.0, pruned_epoch=4)
    write_pays_run(results, folder, 9, 9.0).joinpath("config.yaml").unlink()
    write_pays_run(results, folder, 10, 9.0).joinpath("summary.json").write_text("{")
    blocks = _filled(results)
    assert "| thin: every layer narrower | 0.72 ± 0.05 | 3 |" in blocks["casting"]
    assert "runs left out, named below: 8 of thin" in blocks["verdicts"]
    left = [line.removeprefix("- left out: pays_casting_thin/") for line in blocks["casting"].splitlines()]
    for text in (
        "seed3: precision 32-true, not bf16-mixed; trainer.precision 32-true, not bf16-mixed",
        "seed4: device NVIDIA H200, not x86_64 cpu",
        "seed5: torch 2.11.0, not 2.14.1",
        "seed6: recipe.optimizer.lr 0.2, not 0.1",
        "seed7: unfinished: no epoch of 20 done",
        "seed8: pruned: stopped by its sweep in epoch 4: error 9",
        "seed9: has no config.yaml",
    ):
        assert text in left
    assert any(text.startswith("seed10: damaged: summary.json cannot be read") for text in left)


def test_the_most_runs_that_are_alike_are_the_row(results: Path) -> None:
    write_pays_run(results, "meter_dense", 0, 1.0)
    for seed in (1, 2):
        write_pays_run(results, "meter_dense", seed, 2.0, device="NVIDIA H200")
    block = _filled(results)["meter"]
    assert "| dense | 2.00 ± 0.00 | 2 |" in block
    assert "- left out: pays_meter_dense/seed0: device x86_64 cpu, not NVIDIA H200" in block


def test_multiply_adds_that_are_no_third(results: Path) -> None:
    write_set(results, "casting", errors={arm: ERRORS[arm] for arm in ("dense", "pruned", "targeted")})
    for seed, macs in enumerate((THIRD, int(1.015 * THIRD), int(0.36 * WHOLE))):
        write_pays_run(results, "casting_thin", seed, 0.3, macs_roi=macs)
    blocks = _filled(results)
    said = "thin: 36.0 % (seed 2) of the multiply-adds, not a third"
    assert f"- {said}" in blocks["casting"]
    assert said in blocks["verdicts"]
    assert "seed 1 has" not in blocks["casting"]


def test_what_was_tried_has_a_table_of_its_own(results: Path) -> None:
    write_set(results, "casting")
    for seed, error in enumerate((0.5, 0.6)):
        write_pays_run(results, "casting_targeted_reach25", seed, error, "penalty.reach=0.25")
    write_pays_run(results, "casting_targeted_min5", 0, 0.9).joinpath("summary.json").unlink()
    block = _filled(results)["casting"]
    assert "| reach25 | 0.55 ± 0.64 | 2 | 3.77M | 33.3 % | +0.02 ± " in block
    assert "| min5 | not run |" in block
    assert "- left out: pays_casting_targeted_min5/seed0: unfinished: no epoch of 20 done" in block
    assert "| targeted: ROIs that learn | 0.53 ± 0.04 | 3 |" in block


def test_times_are_of_the_rows_own_networks(results: Path) -> None:
    write_set(results, "casting")
    path = write_timings(results.parent / "timings", "casting")
    block = _filled(results)["casting"]
    assert "| 100.0 % | 0.400 (OpenVINO) | 19.4 (OpenVINO) | [0]" in block
    assert "| 33.3 % | 0.285 (this project) | 13.8 (this project) | [0]" in block
    machine = "A CPU, threads: 2, torch 2.14.1, openvino 2026.1, CPUs busy with something else: 0.03"
    assert f"- timed in float32: {machine}; [pays_casting.json](../timings/pays_casting.json)" in block
    content = json.loads(path.read_text())
    content["networks"][3]["macs"] += 1
    path.write_text(json.dumps(content))
    block = _filled(results)["casting"]
    assert "- not timed: targeted: the file has pays_casting_targeted/seed0 with 3,772,344 multiply-adds" in block
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"pays_casting\.json is no file of timings"):
        _filled(results)


def test_the_command_twice(results: Path) -> None:
    write_set(results, "casting")
    write_set(results, "faces")
    timings = write_timings(results.parent / "timings", "casting").parent
    page = results.parent / "docs" / "pays.md"
    picture = page.parent / FIGURE
    command = [sys.executable, "-m", "tkn.report.pays", str(results), str(page), "--timings", str(timings)]
    subprocess.run(command, check=True, cwd=ROOT)
    once = page.read_bytes(), picture.read_bytes()
    main(command[3:])
    assert (page.read_bytes(), picture.read_bytes()) == once
    assert f"]({FIGURE.as_posix()})" in once[0].decode()
    assert "Not run: meter, gtsrb, " in once[0].decode()


def test_nothing_was_run(results: Path) -> None:
    page = results.parent / "docs" / "pays.md"
    (page.parent / FIGURE).parent.mkdir()
    (page.parent / FIGURE).write_bytes(b"of runs that are gone")
    main([str(results), str(page), "--timings", str(results.parent)])
    assert "No figure: nothing was run." in page.read_text()
    assert not (page.parent / FIGURE).exists()


def test_errors_are_one_line(results: Path) -> None:
    page = results.parent / "docs" / "pays.md"
    for text, message in (
        (PAGE.replace("pays meter", "pays metre"), "unknown pays 'metre'; did you mean 'meter'?"),
        (PAGE.replace("<!-- pays gtsrb -->", ""), "has no block <!-- pays gtsrb --> with an <!-- end -->"),
        (PAGE.removesuffix("<!-- end -->\n"), "has no block <!-- pays pretrained --> with an <!-- end -->"),
    ):
        page.write_text(text)
        with pytest.raises(SystemExit, match=r"tkn\.report\.pays: error: ") as stop:
            main([str(results), str(page)])
        assert message in str(stop.value)
        assert page.read_text() == text
    with pytest.raises(SystemExit, match="nowhere is not a folder"):
        main([str(results.parent / "nowhere"), str(page)])


def test_the_documents_page_is_that_of_the_results() -> None:
    page = ROOT / "docs" / "pays.md"
    text = page.read_text(encoding="utf-8")
    assert fill(text, read_study(ROOT / "results", ROOT / "benchmarks" / "pays"), page) == text
