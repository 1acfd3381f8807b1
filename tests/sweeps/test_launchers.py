"""Whole sweeps over Hydra's launchers, a handful of digits a run, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_COMMAND = [sys.executable, "-c", "from tkn.cli import main; main()", "-m", "experiment=smoke", "data.limit=64"]
_COMMAND += ["trainer.max_epochs=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
_COMMAND += ["hydra.sweep.dir=sweep"]


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A folder for a cluster's files: a short name, for sockets lie in it."""
    folder = tempfile.mkdtemp(prefix="ray")
    yield folder
    shutil.rmtree(folder)


def _sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_COMMAND, *arguments],
        cwd=folder,
        # Ray keeps a key at home, and would tell its makers of its use.
        env={**os.environ, "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("launcher", ["joblib_local", "submitit_local", "ray_local"])
def test_four_runs_of_which_one_fails(tmp_path: Path, ray_folder: str, launcher: str) -> None:
    arguments = [f"hydra/launcher={launcher}", "penalty.l2=1e-4,-1,1e-3,1e-2"]
    if launcher == "ray_local":
        arguments += [f"+hydra.launcher.ray.init._temp_dir={ray_folder}", "+hydra.launcher.ray.init.num_cpus=2"]
    done = _sweep(tmp_path, *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "tkn-run: error: penalty.l2=-1.0 must be at least 0" in done.stderr.splitlines()
    summaries = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("sweep/*/summary.json")}
    assert {name: summary["penalty"]["l2"] for name, summary in summaries.items()} == {"0": 1e-4, "2": 1e-3, "3": 1e-2}
    log = (tmp_path / "sweep" / "0" / "tkn-run.log").read_text()
    assert "INFO epoch 1/1" in log
    assert "GPU available" not in log  # Lightning's small talk
    assert "must be at least 0" in (tmp_path / "sweep" / "1" / "tkn-run.log").read_text()
    if launcher != "submitit_local":  # which starts them all at once, with all cores each
        threads = max(1, (os.cpu_count() or 1) // 2) if launcher == "joblib_local" else 1
        assert all(summary["device"].endswith(f"{threads} threads") for summary in summaries.values())


def test_pareto_with_processes_prunes_and_repeats(tmp_path: Path) -> None:
    # A run that learns nothing (lr=0) is hopeless beside one that does, and shrinks its ROIs.
    space = ("penalty.l2=0,1", "recipe.optimizer.lr=0.0,0.1", "penalty.beta=1", "attention=cauchy")
    sweep = (
        "hydra/sweeper=pareto",
        "hydra/launcher=joblib_local",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=2",
    )
    prune = ("prune=dominated", "prune.runs=1", "prune.grace=0", "trainer.max_epochs=4", "recipe.batch_size=16")
    runs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        done = _sweep(tmp_path / name, *space, *sweep, *prune, "data.limit=128", "trainer.limit_val_batches=8")
        assert done.returncode == 0, done.stderr
        runs.append([_run(tmp_path / name / "sweep" / str(number)) for number in range(4)])
    assert runs[0] == runs[1]
    pruned = [summary["pruned_epoch"] is not None for _, summary in runs[0]]
    assert pruned[:2] == [False, False]  # they had none to compare with
    assert sum(pruned) >= 1
    assert f"4 runs, {sum(pruned)} pruned, 0 failed" in done.stdout


def _run(folder: Path) -> tuple[str, dict[str, object]]:
    """A run's overrides, and its summary but for times."""
    summary = json.loads((folder / "summary.json").read_text())
    return (folder / ".hydra" / "overrides.yaml").read_text(), {
        key: value for key, value in summary.items() if not key.endswith("seconds")
    }


@pytest.mark.parametrize("launcher", ["basic", "joblib_local"])
def test_an_interrupt_stops_the_whole_sweep(tmp_path: Path, launcher: str) -> None:
    process = subprocess.Popen(
        [*_COMMAND, "trainer.max_epochs=1000", "hydra/sweeper=pareto", f"hydra/launcher={launcher}"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob("sweep/*/last.ckpt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    (line,) = (line for line in errors.splitlines() if not line.startswith("stopping after this step"))
    assert line.startswith("tkn-run: interrupted")
    deadline = time.monotonic() + 60  # the workers take a moment
    while time.monotonic() < deadline and _group_lives(process.pid):
        time.sleep(0.1)
    assert not _group_lives(process.pid)
    assert not list(tmp_path.glob("sweep/*/summary.json"))


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
