"""Hopeless runs of a sweep end early, and properly."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from omegaconf import OmegaConf

import tkn
from tkn.cli import compose
from tkn.training.prune import Prune, is_hopeless
from tkn.training.records.history import History

pytestmark = pytest.mark.usefixtures("empty_pictures")

TINY = ("model=tdn10", "data=mnist", "data.source=embedded", "data.limit=64", "recipe.batch_size=32")
TINY = (*TINY, "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.accelerator=cpu")
TINY = (*TINY, "trainer.max_epochs=4", "prune=dominated", "prune.runs=1", "prune.grace=0.25")


@pytest.mark.parametrize(
    ("others", "hopeless"),
    [
        ([(4.0, 80.0), (4.4, 89.0)], True),
        ([(4.0, 80.0), (4.6, 80.0)], False),  # one is better by less than the margin
        ([(4.0, 80.0), (4.0, 95.0)], False),
        ([(4.0, 80.0), (1.0, 200.0)], False),  # better in one objective only
        ([(4.0, 80.0)], False),  # too few
        ([], False),
    ],
)
def test_enough_runs_must_be_better_in_both(others: list[tuple[float, float]], hopeless: bool) -> None:
    rows = [{"valid/mse": error, "macs_roi": macs} for error, macs in others]
    config = OmegaConf.create({"runs": 2, "margin": 0.1, "grace": 0.5})
    assert is_hopeless({"valid/mse": 5.0, "macs_roi": 100.0}, rows, "valid/mse", config) == hopeless


def test_nothing_beats_an_error_of_zero() -> None:
    config = OmegaConf.create({"runs": 1, "margin": 0.0, "grace": 0.5})
    assert not is_hopeless({"test/error": 0, "macs_roi": 9}, [{"test/error": 0, "macs_roi": 1}], "test/error", config)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder with one finished run, better in both from its second epoch on than any other can be."""
    folder = tmp_path_factory.mktemp("sweep")
    tkn.run(compose(*TINY), folder / "0")
    with (folder / "0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows[1:]:
        row["test/error"], row["macs_roi"] = "0.1", "100"
    with (folder / "0" / "metrics.csv").open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_a_hopeless_run_ends_early_and_properly(sweep: Path, caplog: pytest.LogCaptureFixture) -> None:
    summary, objects = tkn.run(compose(*TINY), sweep / "1")
    assert (summary["pruned_epoch"], summary["epochs"]) == (2, 2)
    assert "pruned after epoch 2/4: 1 finished runs" in caplog.text
    assert json.loads((sweep / "1" / "summary.json").read_text()) == summary
    with (sweep / "1" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["test/error"]) == summary["error"]
    assert {"last.ckpt", "best.ckpt", "curves.png"} <= {path.name for path in objects["output_dir"].iterdir()}

    # Cut off before its summary it comes to the same, without one more epoch; and goes on if that is wanted.
    again = (*TINY, f"checkpoint={sweep / '1' / 'last.ckpt'}")
    resumed, _ = tkn.run(compose(*again), sweep / "2")
    for key in ("pruned_epoch", "epochs", "error", "macs_roi", "best_epoch"):
        assert resumed[key] == summary[key], key
    whole, _ = tkn.run(compose(*again, "prune.runs=null"), sweep / "3")
    assert (whole["pruned_epoch"], whole["epochs"]) == (None, 4)


@pytest.mark.parametrize(
    "override",
    [
        "prune.runs=null",
        "prune.runs=2",
        "prune.grace=0.75",  # no epoch is left
        "data.limit=65",  # other data
        "trainer.limit_val_batches=2",  # another part of the test set
    ],
)
def test_other_runs_go_on(sweep: Path, override: str) -> None:
    summary, _ = tkn.run(compose(*TINY, override), sweep / override)
    (sweep / override / "summary.json").unlink()
    assert (summary["pruned_epoch"], summary["epochs"]) == (None, 4)


def test_unfinished_and_pruned_runs_do_not_count(sweep: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, summary in (
        ("unfinished", None),
        ("pruned", {"mode": "train", "pruned_epoch": 3}),
        ("test", {"mode": "test"}),
        ("damaged", "{"),
    ):
        (tmp_path / name).mkdir()
        for file in ("metrics.csv", "config.yaml"):
            (tmp_path / name / file).write_bytes((sweep / "0" / file).read_bytes())
        if summary is not None:
            text = summary if isinstance(summary, str) else json.dumps(summary)
            (tmp_path / name / "summary.json").write_text(text)
    assert tkn.run(compose(*TINY), tmp_path / "run")[0]["pruned_epoch"] is None
    assert f"prune: {tmp_path / 'damaged'} is not compared with: " in caplog.text


@pytest.mark.parametrize(("override", "count"), [("data.workers=2", 1), ("data.memory=0.5", 1), ("data.size=9", 0)])
def test_how_images_are_read_makes_no_other_data(tmp_path: Path, override: str, count: int) -> None:
    config = compose("data=folder", "data.path=images", "prune=dominated")
    other = tmp_path / "other"
    other.mkdir()
    OmegaConf.save(compose("data=folder", "data.path=images", override), other / "config.yaml", resolve=True)
    (other / "summary.json").write_text('{"mode": "train"}')
    (other / "metrics.csv").write_text("epoch,macs_roi\n1,100\n")
    prune = Prune(tmp_path / "run", History(tmp_path / "metrics.csv"), config)
    trainer: Any = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(broadcast=lambda found: found))
    prune.on_fit_start(trainer, pl.LightningModule())
    assert prune.others == [{1: {"epoch": 1, "macs_roi": 100}}] * count
