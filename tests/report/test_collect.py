"""Finding runs, and telling what each came to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import EMBEDDED, config_text, summary_of, write_run

from tkn.report.runs.collect import collect
from tkn.report.runs.run import Run, read_run


def _only(folder: Path) -> Run:
    (run,), empty = collect([folder])
    assert not empty
    return run


def test_runs_are_found_below_folders_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        write_run(tmp_path / "sweep" / str(number), seed=number)
    hydra = tmp_path / "sweep" / "0" / ".hydra"
    hydra.mkdir()
    (hydra / "config.yaml").write_text(config_text())
    (tmp_path / "nothing").mkdir()
    runs, empty = collect([tmp_path / "sweep", tmp_path, tmp_path / "nothing"])
    assert [run.folder.name for run in runs] == ["0", "2", "10"]
    assert [run.state for run in runs] == ["finished"] * 3
    assert empty == [tmp_path / "nothing"]
    assert not runs[0].remarks


def test_other_folders_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("defaults:\n  - model: tdn10\nmode: train\n")  # conf/
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "config.yaml").write_text("case: tkn6_mnist\n")
    (tmp_path / "bench" / "bench.json").write_text("{}")
    (tmp_path / "report.md").write_bytes(b"\xff\x00")
    assert collect([tmp_path]) == ([], [tmp_path])


@pytest.mark.parametrize(("name", "error"), [("no", FileNotFoundError), ("file", NotADirectoryError)])
def test_paths_must_be_folders(tmp_path: Path, name: str, error: type[OSError]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=name):
        collect([tmp_path / name])


def test_an_unfinished_run_tells_how_far_it_came(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_text("trainer.max_epochs=7"))
    run = _only(tmp_path)
    assert (run.state, run.reason) == ("unfinished", "no epoch of 7 done")
    (tmp_path / "metrics.csv").write_text("epoch,test/error\n1,3.5\n2,2.5\n")
    assert _only(tmp_path).reason == "2 of 7 epochs done, test/error 2.5"
    (tmp_path / "metrics.csv").write_bytes(b"epoch\n\xff\xfe")
    assert _only(tmp_path).reason == "no summary.json, and metrics.csv cannot be read"
    (tmp_path / "metrics.csv").write_text("epoch,test/error\nhalf a")
    assert _only(tmp_path).state == "unfinished"


def test_a_failed_run_tells_why(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_text())
    log = tmp_path / "tkn-run.log"
    log.write_text("10:00:00 INFO epoch 1/2\n10:00:01 ERROR run 3 (a=(1,2),seed=0) failed: the loss became nan\n")
    run = _only(tmp_path)
    assert (run.state, run.reason) == ("failed", "the loss became nan")
    log.write_text(log.read_text() + "10:05:00 INFO epoch 1/2: continued\n")
    assert _only(tmp_path).state == "unfinished"
    # It failed before it had written its configuration.
    (tmp_path / "config.yaml").unlink()
    log.write_text("10:00:01 ERROR mode=tran must be train or test\n")
    run = _only(tmp_path)
    assert (run.state, run.reason) == ("failed", "mode=tran must be train or test")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read"),
        ("", "cannot be read"),
        ("[1]", "holds no keys"),
        (json.dumps({"model": "tdn10"}), "has no data"),
        (json.dumps(summary_of(seed="zero")), "has seed='zero'"),
        (json.dumps(summary_of(error=float("nan"))), "has error=nan"),
        (json.dumps({k: v for k, v in summary_of().items() if k != "error"}), "has neither error nor mse and mae"),
        (json.dumps(summary_of(attention="cauchy")), "has attention='cauchy'"),
        (json.dumps(summary_of(attention={"name": "box"})), "has attention={'name': 'box'}"),
        (json.dumps(summary_of(commit=1)), "has commit=1"),
        (json.dumps(summary_of(penalty={"l2": 1e-4})), "has penalty={'l2': 0.0001}"),
        (json.dumps(summary_of(target_layers=[3])), "has target_layers=[3]"),
        (json.dumps(summary_of(macs_roi=0)), "has macs_roi=0"),
    ],
)
def test_a_damaged_summary_is_named(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    run = _only(tmp_path)
    assert run.state == "damaged"
    assert reason in run.reason
    assert run.summary is None


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "a" / "config.yaml").write_text("a: [")
    run = _only(tmp_path / "a")
    assert (run.state, run.remarks) == ("finished", ("config.yaml cannot be read",))
    (tmp_path / "a" / "summary.json").unlink()
    (tmp_path / "a" / "tkn-run.log").write_text("")
    assert _only(tmp_path / "a").state == "damaged"


@pytest.mark.parametrize(
    ("changes", "state", "reason"),
    [
        ({"mode": "test", "error": 1.25}, "tested", "only tests a checkpoint: error 1.25"),
        ({"pruned_epoch": 3}, "pruned", "stopped by its sweep in epoch 3: error 0.5"),
        ({"pruned_epoch": None}, "finished", ""),
    ],
)
def test_runs_that_are_not_counted(tmp_path: Path, changes: dict[str, Any], state: str, reason: str) -> None:
    run = _only(write_run(tmp_path / "run", **changes))
    assert (run.state, run.reason) == (state, reason)


def test_other_data_soft_windows_and_missing_configurations_are_remarked(tmp_path: Path) -> None:
    run = _only(write_run(tmp_path / "embedded", data_source=EMBEDDED))
    assert run.remarks == ("not the whole data set (embedded)",)
    assert not run.whole
    attention = {"name": "cauchy", "scale_unit": 0.5, "min_size": 3, "clip": False}
    run = _only(write_run(tmp_path / "soft", attention=attention, error_clipped=0.75))
    assert run.remarks == ("the error is without clipping to the ROIs; clipped: error 0.75",)
    assert run.soft
    (tmp_path / "soft" / "config.yaml").unlink()
    assert "there is no config.yaml" in _only(tmp_path / "soft").remarks


def test_configurations_of_other_versions_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("engine: auto\n", "momentum: 1\n").replace("beta:", "gamma:"))
    run = _only(folder)
    (remark,) = run.remarks
    assert remark == "config.yaml is of another version: it has momentum, penalty.gamma and lacks penalty.beta, engine"
    assert run.state == "finished"


def test_the_earliest_of_two_equal_runs_is_counted(tmp_path: Path) -> None:
    write_run(tmp_path / "a", finished=20)
    write_run(
        tmp_path / "b", "data_dir=elsewhere", "trainer.accelerator=cpu", "logger=wandb", "prune=dominated", finished=10
    )
    write_run(tmp_path / "c", seed=1)
    write_run(tmp_path / "d", "recipe.optimizer.lr=0.2")
    runs, _ = collect([tmp_path])
    assert [run.state for run in runs] == ["duplicate", "finished", "finished", "finished"]
    assert runs[0].reason == f"the same configuration and seed as {tmp_path / 'b'}"


def test_a_dense_network_has_no_penalty_to_differ_in(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "penalty=none", model="dn10")
    write_run(tmp_path / "b", "penalty.l2=1", "engine=dense", model="dn10", finished=1)
    assert [run.state for run in collect([tmp_path])[0]] == ["finished", "duplicate"]


def test_a_folder_without_any_sign_is_no_run(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None
