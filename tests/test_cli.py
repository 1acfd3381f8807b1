"""The command itself, nearly always in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import TKN_RUN, run_forked
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from hydra_plugins.tkn_pareto import ParetoSweeper
from tkn.cli import compose, main

SMALL = ("experiment=smoke", "data.limit=64", "trainer.max_epochs=1", "trainer.limit_val_batches=1")
SMALL = (*SMALL, "trainer.limit_test_batches=1")


def _tkn_run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_forked(TKN_RUN, *arguments, folder=folder, **{"HYDRA_FULL_ERROR": "0", **environment})


def _one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_smoke(tmp_path: Path) -> None:
    done = _tkn_run(tmp_path, "experiment=smoke")
    assert done.returncode == 0, done.stderr
    (summary_path,) = tmp_path.glob("outputs/*/*/summary.json")
    summary = json.loads(summary_path.read_text())
    assert summary["experiment"] == "smoke"
    assert "embedded" in summary["data_source"]
    assert summary["error"] < 88  # chance is 90
    assert {"attention_maps.png", "curves.png", "tkn-run.log"} <= {p.name for p in summary_path.parent.iterdir()}
    for text in ("times fewer than the baseline", "block1.0.layers.conv1", "TargetConv2d", "summary.json"):
        assert text in done.stdout
    assert not (tmp_path / "datasets").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model=tdn11",), "unknown model 'tdn11'; did you mean 'tdn10'?"),
        (("modle=tdn10",), "unknown key 'modle'; did you mean 'mode"),
        (("penalty.l3=1",), "unknown key 'penalty.l3'; did you mean 'penalty.l2'?"),
        (("penalty.share=0.3",), "unknown key 'penalty.share'; it is a key of penalty=budget"),
        (("lr=1",), "unknown key 'lr'; did you mean 'recipe.optimizer.lr'?"),
        (("penalty.l2=-1",), "penalty.l2=-1.0 must be at least 0"),
        (("-m", "model=dn10,tdn11"), "unknown model 'tdn11'; did you mean 'tdn10'?"),
        (("penalty.l3=1", "penalty.l4=2"), "unknown key 'penalty.l3'; did you mean 'penalty.l2'?"),
        (("recipe=gtsrb", "recipe.optimizer.momentum=1"), "write +recipe.optimizer.momentum=..."),
        (("-m", "model=glob(nope*)"), "model=glob(nope*) matches nothing"),
        (
            ("-m", "hydra/sweeper=pareto", "hydra.sweeper.n_trial=3"),
            "'hydra.sweeper.n_trial'; did you mean 'hydra.sweeper.n_",
        ),
        (
            ("-m", "hydra/sweeper=pareto", "+hydra.sweeper.params={penalty.l3:'1,2'}"),
            "unknown key 'penalty.l3'; did you",
        ),
        (("-m", "hydra/launcher=slrum"), "unknown hydra/launcher 'slrum'; did you mean 'slurm'?"),
        (("experiment=smok",), "unknown experiment 'smok'; did you mean 'smoke'?"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(
    wrong_arguments: Callable[..., str], arguments: tuple[str, ...], message: str
) -> None:
    line = wrong_arguments(main, *arguments)
    assert line.startswith("tkn-run: error: ")
    assert message in line


def test_a_wrong_argument_is_one_line(tmp_path: Path) -> None:
    line = _one_line_error(_tkn_run(tmp_path, "model=tdn11"))
    assert line == "tkn-run: error: unknown model 'tdn11'; did you mean 'tdn10'?"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("launcher", "plugin", "extra"),
    [("joblib_local", "joblib", "sweep"), ("slurm", "submitit_slurm", "slurm"), ("ray_local", "ray", "ray")],
)
def test_a_missing_launcher_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, launcher: str, plugin: str, extra: str
) -> None:
    Plugins.instance()  # registers what is installed
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], f"{plugin}.yaml", raising=False)
    for name in (launcher, plugin):
        with pytest.raises(ValueError, match=f"^hydra/launcher={plugin} needs the extra '{extra}'$"):
            compose(f"hydra/launcher={name}")


def test_a_missing_optuna_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"^hydra/sweeper=pareto needs the extra 'sweep'$"):
        ParetoSweeper(n_trials=1, n_jobs=1, sampler=OmegaConf.create(), params=None).sweep([])


def test_missing_data_is_one_line_and_in_the_log(tmp_path: Path) -> None:
    line = _one_line_error(_tkn_run(tmp_path, "data=pain"))
    assert "datasets/pain/Images" in line
    (log,) = tmp_path.glob("outputs/*/*/tkn-run.log")
    assert "datasets/pain/Images" in log.read_text()


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = _one_line_error(_tkn_run(tmp_path, *SMALL, "hydra.run.dir=file/run"))
    assert "file/run" in line


def test_traceback_on_request(tmp_path: Path) -> None:
    done = _tkn_run(tmp_path, "penalty.l2=-1", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "ValueError: penalty.l2=-1.0 must be at least 0"


def test_sweep_goes_on_after_a_failure(tmp_path: Path) -> None:
    done = _tkn_run(tmp_path, "-m", *SMALL, "model=dn10,tdn10", "penalty.l2=-1,1e-4", "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "tkn-run: error: penalty.l2=-1.0 must be at least 0"
    finished = {path.parent.name for path in tmp_path.glob("sweep/*/summary.json")}
    assert finished == {"1", "3"}
    assert "penalty.l2=-1.0 must be at least 0" in (tmp_path / "sweep" / "0" / "tkn-run.log").read_text()


def test_python_cli_py_is_tkn_run(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "cli.py"
    done = subprocess.run(
        [sys.executable, str(script), "--cfg", "job", "model=tkn6"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "name: tkn6" in done.stdout
