"""Runs in two processes on the CPU (gloo)."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from runs import TINY, assert_same_run, recorded_rois

import tkn
from tkn.cli import compose
from tkn.training import run

TWO = ("trainer.devices=2", "trainer.strategy=ddp")
#: No batch normalisation and no dropout, so that the number of processes makes no difference. 43 = 16 + 16 + 11.
SAME = (*TINY, "model=tkn6", "model.dropout=0", "data.limit=43", "recipe.batch_size=16", "penalty.l2=0.01")
SAME = (*SAME, "trainer.max_epochs=1", "recipe.optimizer.lr=0.01", "engine=dense")


def _run_and_keep(config: DictConfig, folder: Path, rank: int, *, continued: Path | None) -> dict[str, Any]:
    """A run's part in one process, which keeps its own parameters for the test to see."""
    original = run._run

    def keeping(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        summary, made = original(*arguments)
        torch.save(made["module"].model.state_dict(), folder / f"process{rank}.pt")
        return summary, made

    run._run = keeping  # in this process, which is there for the run alone
    return run._run_in_group(config, folder, rank, continued=continued)


def test_two_processes_do_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # All 1,000 test digits, by each process 500: the error is a whole number of a thousandth.
    arguments = (*SAME, "trainer.limit_test_batches=null")
    one, _ = tkn.run(compose(*arguments), tmp_path / "one")
    monkeypatch.setattr(run, "_run_in_group", _run_and_keep)
    two, objects = tkn.run(compose(*arguments, *TWO), tmp_path / "two")
    assert objects.keys() == {"config", "output_dir"}
    assert json.loads((tmp_path / "two/summary.json").read_text()) == two
    for key in ("parameters", "macs_roi", "macs_dense", "epochs", "train_images"):
        assert two[key] == one[key], key
    rows = [next(csv.DictReader((tmp_path / name / "metrics.csv").read_text().splitlines())) for name in ("one", "two")]
    for key in ("train/loss", "train/error", "lr"):
        assert float(rows[1][key]) == pytest.approx(float(rows[0][key]), rel=1e-5), key
    rois = [recorded_rois(tmp_path / name) for name in ("one", "two")]
    for name, values in rois[0].items():
        # Adam divides small gradients by their own size, and with it what two processes' sums round otherwise.
        assert rois[1][name] == pytest.approx(values, abs=5e-6), name
    assert (rois[0]["0.scale"][1] < 1).any()
    parameters = [torch.load(tmp_path / f"two/process{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in parameters[0].items():
        assert torch.equal(value, parameters[1][name]), name
    saved = torch.load(tmp_path / "two/last.ckpt", weights_only=True)["state_dict"]
    for name, value in parameters[0].items():
        assert torch.equal(saved[f"model.{name}"], value), name
    # No image is evaluated twice.
    tested, _ = tkn.run(compose(*arguments, "mode=test", f"checkpoint={tmp_path / 'two/last.ckpt'}"), tmp_path / "test")
    assert two["error"] == tested["error"]
    assert two["error"] * 10 == pytest.approx(round(two["error"] * 10), abs=1e-4)


def test_a_process_that_fails_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training loss became (nan|inf) in epoch 1"):
        tkn.run(compose(*SAME, *TWO, "model=dn10", "recipe.optimizer.lr=1e30"), tmp_path)
    # Where only the first process fails.
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked/rois.npz").mkdir()
    with pytest.raises(OSError, match=r"rois\.npz"):
        tkn.run(compose(*SAME, *TWO, "model=tdn10"), tmp_path / "blocked")


@pytest.mark.slow
def test_missing_data_in_the_processes_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pain/Images"):
        tkn.run(compose(*TWO, "data=pain", f"data_dir={tmp_path}"), tmp_path / "pain")


@pytest.mark.slow
def test_a_signal_while_the_processes_start_is_an_interrupt(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from tkn.cli import main; main()", *SAME, *TWO, "hydra.run.dir=run"]
    for seconds in (0.0, 1.0, 3.0):
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "HYDRA_FULL_ERROR": "0"}, stderr=subprocess.PIPE, text=True
        )
        while not (tmp_path / "run/tkn-run.log").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
        (line,) = (line for line in errors.splitlines() if not line.startswith("stopping after this step"))
        assert (process.returncode, line[:20]) == (143, "tkn-run: interrupted")
        shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_a_signal_saves_in_all_processes_and_the_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    arguments = (*TINY, *TWO, "model=tdn10", "model.dropout=0.2", "trainer.max_epochs=5", "penalty.l2=0.01")
    arguments = (*arguments, "engine=roi", "recipe.ema_decay=0.9")
    tkn.run(compose(*arguments), tmp_path / "whole")
    command = [sys.executable, "-c", "from tkn.cli import main; main()", *arguments, "hydra.run.dir=broken"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "HYDRA_FULL_ERROR": "0"}, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "broken/best.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert errors.splitlines()[-1] == "tkn-run: interrupted: the same command with hydra.run.dir=broken continues it"
    assert not (tmp_path / "broken/summary.json").exists()
    tkn.run(compose(*arguments), tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
