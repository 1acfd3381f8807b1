"""What hydra/sweeper=pareto chooses and reports, for a task that takes no time, in processes of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tkn.sweep.objectives import Objectives, PrunedObjectives, objectives

pytestmark = pytest.mark.slow

#: The error grows with l2, the multiply-adds fall with it; a beta above 1 spoils both.
_PROGRAM = """
from tkn.sweep.objectives import Objectives, PrunedObjectives
from tkn.training.compose import TKN_RUN

def task(config):
    l2, beta = config.penalty.l2, config.penalty.beta
    if l2 > 5e-3:
        raise ValueError(f"l2={l2}")
    pruned = config.attention.name == "gaussian" and beta > 2
    return (PrunedObjectives if pruned else Objectives)(1e4 * l2 + beta, 1e3 * beta / l2)

TKN_RUN.main(lambda: task, lambda: print)
"""


def _sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, "-m", "hydra/sweeper=pareto", f"hydra.sweep.dir={folder}", *arguments],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _choices(folder: Path) -> list[dict[str, str]]:
    """The overrides of every run, in order."""
    count = len(list(folder.glob("*/.hydra")))
    texts = [(folder / str(number) / ".hydra" / "overrides.yaml").read_text() for number in range(count)]
    return [dict(override.split("=") for override in yaml.safe_load(text)) for text in texts]


@pytest.mark.parametrize("jobs", [1, 4])
def test_choices_repeat_and_get_better(tmp_path: Path, jobs: int) -> None:
    arguments = ("hydra.sweeper.n_trials=20", f"hydra.sweeper.n_jobs={jobs}", "seed=3")
    done, again = _sweep(tmp_path / "first", *arguments), _sweep(tmp_path / "second", *arguments)
    choices = _choices(tmp_path / "first")
    assert len(choices) == 20
    assert choices == _choices(tmp_path / "second")
    l2, beta = ([float(run[f"penalty.{key}"]) for run in choices] for key in ("l2", "beta"))
    assert min(l2) >= 1e-5
    assert max(l2) <= 1e-2
    assert min(beta) >= 1
    assert max(beta) <= 4
    assert {run["attention"] for run in choices} == {"cauchy", "gaussian"}
    assert {run["seed"] for run in choices} == {"3"}
    # After 10 at random it has learned that small betas are better.
    assert sum(beta[10:]) / 10 < sum(beta[:10]) / 10

    # Failures fail the sweep, but at its end.
    failed = {number for number in range(20) if l2[number] > 5e-3}
    pruned = {
        number for number in range(20) if choices[number]["attention"] == "gaussian" and beta[number] > 2
    } - failed
    assert min(len(failed), len(pruned)) > 0
    assert done.returncode == again.returncode == 1
    assert done.stderr.splitlines()[-1] == f"tkn-run: error: l2={l2[min(failed)]}"

    values = {n: (1e4 * l2[n] + beta[n], beta[n] / l2[n]) for n in set(range(20)) - failed - pruned}
    best = [n for n, (error, macs) in values.items() if not any(e < error and m < macs for e, m in values.values())]
    _, report = done.stdout.split(f"20 runs, {len(pruned)} pruned, {len(failed)} failed")
    reported = re.findall(r"#(\d+): error ([\d.]+), ([\d.]+)M multiply-adds: penalty.l2=", report)
    assert [int(number) for number, _, _ in reported] == sorted(best, key=lambda n: values[n][1])
    assert [float(error) for _, error, _ in reported] == sorted((float(e) for _, e, _ in reported), reverse=True)


def test_arguments_say_what_is_swept(tmp_path: Path) -> None:
    arguments = (
        "penalty.l2=1e-4",
        "penalty.beta=1,2",
        "seed=int(interval(5,7))",
        "model=glob(tdn*)",
        "attention=cauchy",
    )
    done = _sweep(tmp_path / "sweep", *arguments, "hydra.sweeper.n_trials=12")
    assert done.returncode == 0, done.stderr
    swept = {key: {run[key] for run in _choices(tmp_path / "sweep")} for key in ("penalty.beta", "seed", "model")}
    assert swept == {"penalty.beta": {"1", "2"}, "seed": {"5", "6", "7"}, "model": {"tdn10", "tdn40"}}
    assert {(run["penalty.l2"], run["attention"]) for run in _choices(tmp_path / "sweep")} == {("1e-4", "cauchy")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hydra.sweeper.n_trials=0",), "hydra.sweeper.n_trials=0 must be a whole number, at least 1"),
        (("penalty.l2=tag(lgo,interval(1,2))",), "the only tag of an interval is log"),
        (("penalty.l2=tag(log,interval(0.0,2.0))",), "penalty.l2=tag(log,interval(0.0,2.0)): "),
        (("penalty.l2=1", "penalty.beta=1", "attention=cauchy"), "hydra/sweeper=pareto has no key to vary"),
    ],
)
def test_wrong_settings_start_nothing(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = _sweep(tmp_path / "sweep", *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_objectives_are_those_of_held_out_images_if_there_are_any() -> None:
    summary = {"error": 3.0, "best_error": 2.0, "best_chosen_on": "test", "macs_roi": 7, "pruned_epoch": None}
    assert objectives(summary) == (3, 7)
    assert objectives(summary | {"best_chosen_on": "valid"}) == (2, 7)
    assert type(objectives(summary)) is Objectives
    assert type(objectives(summary | {"pruned_epoch": 2})) is PrunedObjectives
    regression = {"mse": 1.5, "mae": 1.0, "best_mse": 1.25, "best_chosen_on": None, "macs_roi": 7, "pruned_epoch": None}
    assert objectives(regression) == (1.5, 7)
