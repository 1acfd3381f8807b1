"""`tkn.sweep.fill`: what it runs next, how it stops in time, and that it goes on where it stopped."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from forked import ForkedPython
from omegaconf import OmegaConf
from own_images import face_rows, write_faces, write_folder

from tkn.app.files import locked, own_folder
from tkn.bench.alone import alone, benchmark_runs
from tkn.sweep import fill as filling
from tkn.sweep.child import Failure, supervise
from tkn.sweep.fill import fill, main
from tkn.sweep.rows import Row, find_rows
from tkn.sweep.turns import CLAIM, Turn, Turns
from tkn.sweep.work import work
from tkn.training.compose import compose
from tkn.training.config import check_config

ROW = "table2_dn10"
SMALL = ("data.source=embedded", "data.limit=64", "recipe.batch_size=32", "trainer.accelerator=cpu")
SMALL = (*SMALL, "trainer.max_epochs=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1")


def finish(results: Path, experiment: str, seed: int) -> None:
    """Leave what a finished run leaves."""
    folder = results / experiment / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")


def next_run(rows: list[Row], results: Path, seeds: int | None = None) -> tuple[Row, int] | None:
    """The row and the number of its run that come next."""
    turn = Turns(rows, results, seeds).next()
    return turn and (turn.row, turn.number)


def order(rows: list[Row], results: Path, count: int) -> list[tuple[str, int]]:
    """The first runs that are chosen, each of which finishes."""
    chosen = []
    for _ in range(count):
        found = next_run(rows, results)
        assert found is not None
        finish(results, found[0].experiment, found[1])
        chosen.append((found[0].experiment, found[1]))
    return chosen


def test_the_fewest_seeds_first_and_the_cheapest_of_these(tmp_path: Path) -> None:
    rows = find_rows("table[23]_*", [])
    work = {row.experiment: row.work for row in rows}
    assert work["table2_dn10"] == work["table2_tdn10_cauchy"] == 11_317_030 * 60_000 * 20
    assert work["table2_dn10"] < work["table3_dn10"] < work["table2_cnn6"] < work["table3_tkn6_gaussian"]

    rows = [row for row in rows if row.experiment in ("table2_dn10", "table3_dn10", "table2_cnn6")]
    for seed in (0, 2):
        finish(tmp_path, "table2_dn10", seed)
    assert order(rows, tmp_path, 6) == [
        *(("table3_dn10", 0), ("table2_cnn6", 0), ("table3_dn10", 1), ("table2_cnn6", 1)),
        *(("table2_dn10", 1), ("table3_dn10", 2)),
    ]
    unfinished = tmp_path / "table2_dn10" / "seed4"
    unfinished.mkdir()
    assert next_run(rows, tmp_path) == (rows[0], 2)  # nothing has begun there
    (unfinished / "last.ckpt").touch()
    assert next_run([row for row in rows if row.experiment == "table2_dn10"], tmp_path)[1] == 4  # type: ignore[index]
    assert next_run([], tmp_path) is None


@pytest.fixture(autouse=True)
def _results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where results are is set for this process's experiments, and not left to other tests."""
    monkeypatch.setenv("TKN_RESULTS", "results")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], set[str]]:
    """Runs that take no time: those that were made, in order, and those that shall fail."""
    made: list[str] = []
    failing: set[str] = set()

    class FakeRun:
        """A run's process that has ended."""

        def __init__(self, _config: dict[str, Any], folder: Path) -> None:
            self.name = f"{folder.parent.name}/{folder.name}"
            made.append(self.name)
            (folder / "last.ckpt").touch()
            if self.name not in failing:
                (folder / "summary.json").touch()

        def failure(self) -> Failure | None:
            return Failure("it diverged", missing=False) if self.name in failing else None

    monkeypatch.setattr(filling, "RunProcess", FakeRun)
    monkeypatch.setattr(filling, "supervise", lambda *_: None)
    return made, failing


def test_a_seed_that_failed_does_not_block_the_others(
    tmp_path: Path, runs: tuple[list[str], set[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    rows = find_rows("table[23]_dn10", [])
    expected = [f"{name}/seed{seed}" for name in ("table2_dn10", "table3_dn10") for seed in (0, 1)]
    runs[1].update(expected)
    fill(rows, tmp_path, 100.0, clock=lambda: 0.0)
    assert runs[0] == expected
    said = capfd.readouterr().err.splitlines()
    assert [line.split(": ")[2].rsplit("/", 1)[-1] for line in said] == ["seed0", "table2_dn10", "seed0", "table3_dn10"]


def row_after(
    experiment: str, name: str, key: str = "model.weights", path: str = "{}/seed${{seed}}/last.ckpt"
) -> list[Row]:
    """The rows of `experiment` and of one, cheaper, that begins with a file of its runs."""
    (before,) = find_rows(experiment, SMALL)
    arguments = (*before.arguments, "trainer.max_epochs=1")
    config = compose(*arguments)
    OmegaConf.update(config, key, "${oc.env:TKN_RESULTS,results}/" + path.format(experiment), force_add=True)
    return [before, Row(name, arguments, config, before.work / 2)]


@pytest.mark.parametrize("key", ["model.weights", "channels.checkpoint", "rois.checkpoint"])
def test_a_row_waits_for_the_runs_whose_checkpoints_it_needs(
    tmp_path: Path, runs: tuple[list[str], set[str]], key: str
) -> None:
    fill(row_after(ROW, "warm", key), tmp_path, 100, lambda: 0.0, seeds=3)
    assert runs[0] == [f"{row}/seed{seed}" for seed in range(3) for row in (ROW, "warm")]


def test_an_unfinished_run_is_waited_for(tmp_path: Path) -> None:
    rows = row_after(ROW, "warm")
    folder = tmp_path / ROW / "seed0"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").touch()
    assert next_run(rows, tmp_path) == (rows[0], 0)


@pytest.mark.parametrize(
    ("chosen", "left", "said"),
    [
        ((ROW, "warm"), {"seed0", "seed1"}, "last.ckpt: that run could not be done"),
        (("warm",), set(), f"{ROW} has to come before, and is not among the experiments"),
    ],
)
def test_a_row_is_left_with_the_one_that_it_needs(
    tmp_path: Path,
    runs: tuple[list[str], set[str]],
    capfd: pytest.CaptureFixture[str],
    chosen: tuple[str, ...],
    left: set[str],
    said: str,
) -> None:
    made, failing = runs
    failing.update(f"{ROW}/{seed}" for seed in left)
    fill([row for row in row_after(ROW, "warm") if row.experiment in chosen], tmp_path, 100, lambda: 0.0)
    assert set(made) == failing
    lines = capfd.readouterr().err.splitlines()
    assert said in lines[-1]
    assert lines[-1].startswith("tkn.sweep.fill: left: warm: model.weights=")


def test_a_recorded_run_without_its_checkpoint_is_named(
    tmp_path: Path, runs: tuple[list[str], set[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    finish(tmp_path, ROW, 0)
    fill(row_after(ROW, "warm"), tmp_path, 100, lambda: 0.0, seeds=2)
    folder = tmp_path / ROW / "seed0"
    assert capfd.readouterr().err.startswith(
        f"tkn.sweep.fill: left: {tmp_path / 'warm' / 'seed0'}: model.weights={folder / 'last.ckpt'}: that run is "
        f"finished but left no such file: remove {folder} to have it done anew\n"
    )
    assert runs[0] == [f"{ROW}/seed1", "warm/seed1"]


def test_what_never_comes_is_not_waited_for(tmp_path: Path, runs: tuple[list[str], set[str]]) -> None:
    """The other row ends before it, or waits for this one."""
    rows = row_after(ROW, "warm", path="{}/seed7/last.ckpt")
    fill(rows, tmp_path / "seeds", 100, lambda: 0.0, seeds=1)
    circle = [row_after(ROW, name, path=f"{other}/seed0/last.ckpt")[1] for name, other in (("a", "b"), ("b", "a"))]
    fill(circle, tmp_path / "circle", 100, lambda: 0.0)
    assert runs[0] == [f"{ROW}/seed0"]


def test_other_files_must_be_there(
    tmp_path: Path, runs: tuple[list[str], set[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    """What lies elsewhere does not come, and is not taken for missing data."""
    rows = row_after(ROW, "warm", path="../elsewhere/last.ckpt")
    fill(rows, tmp_path / "results", 100, lambda: 0.0, seeds=1)
    assert runs[0] == [f"{ROW}/seed0"]
    assert "elsewhere/last.ckpt is not a file" in capfd.readouterr().err


def test_a_row_ends_with_so_many_seeds(tmp_path: Path) -> None:
    (row,) = find_rows(ROW, [])
    for seed in (0, 5):
        finish(tmp_path, ROW, seed)
    assert next_run([row], tmp_path, seeds=2) is None
    assert next_run([row], tmp_path, seeds=3) == (row, 1)


def test_all_folds_of_a_seed_are_its_runs(tmp_path: Path, runs: tuple[list[str], set[str]]) -> None:
    rows = find_rows("kfold_faces_*", ["data.folds=2"])
    assert rows[0].run(3) == ("experiment=kfold_faces_dense", "data.folds=2", "data.fold=1", "seed=1")
    content = rows[0].configuration(3, tmp_path)
    assert (content["data"]["folds"], content["data"]["fold"], content["seed"]) == (2, 1, 1)
    (tmp_path / "kfold_faces_dense" / "fold0seed0").mkdir(parents=True)
    (tmp_path / "kfold_faces_dense" / "fold0seed0" / "summary.json").touch()
    fill(rows, tmp_path, 1e9, seeds=2)
    done = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.glob("*/*/summary.json"))
    folders = ("fold0seed0", "fold0seed1", "fold1seed0", "fold1seed1")
    assert done == [f"kfold_faces_{name}/{folder}" for name in ("dense", "targeted") for folder in folders]
    assert runs[0][:2] == ["kfold_faces_targeted/fold0seed0", "kfold_faces_dense/fold1seed0"]


def test_two_at_once_do_not_choose_the_same_run(tmp_path: Path, runs: tuple[list[str], set[str]]) -> None:
    rows = row_after(ROW, "warm")
    folder = tmp_path / ROW / "seed0"
    folder.mkdir(parents=True)
    with locked(folder / CLAIM):  # the other has begun it, and the row's run with this seed waits
        assert next_run(rows, tmp_path) == (rows[0], 1)
        assert next_run(rows, tmp_path, seeds=1) is None
        assert Turns(rows, tmp_path, 1).others_run()
        assert filling._do(Turn(rows[0], 0), folder, tmp_path, lambda: 0.0, (0.0, 0.0)) is None
        assert not runs[0]
    with own_folder(folder):
        assert next_run(rows, tmp_path) == (rows[0], 1)
    assert next_run(rows, tmp_path) == (rows[0], 0)
    assert not list(folder.iterdir())


def test_work_follows_the_overrides() -> None:
    (whole,), (part,) = find_rows(ROW, []), find_rows(ROW, ["data.limit=600", "trainer.max_epochs=2"])
    assert whole.work == 1000 * part.work
    assert whole.run(3) == (f"experiment={ROW}", "seed=3")
    assert part.run(0) == (f"experiment={ROW}", "data.limit=600", "trainer.max_epochs=2", "seed=0")


def test_moved_digits_are_as_much_work_as_tlmnist() -> None:
    of_moved, of_tlmnist = (
        work(check_config(compose("model=dn10", f"data={name}", "trainer.max_epochs=20")))
        for name in ("mnist_moved", "tlmnist")
    )
    assert of_moved == of_tlmnist < float("inf")


def test_work_is_guessed_of_images_of_ones_own(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", {"train/a": 3, "train/b": 2, "test/a": 1, "test/b": 1})
    faces = write_faces(tmp_path / "faces", face_rows(6))
    dn10 = ["model=dn10", "trainer.max_epochs=20"]
    folder = [*dn10, "data=folder", f"data.path={images}", "data.size=28", "data.channels=1"]
    whole, thin, thinner, of_faces, nowhere = (
        work(check_config(compose(*arguments)))
        for arguments in (
            folder,
            [*folder, "model.thin=0.5"],
            [*folder, "model.thin=1000000"],
            [*dn10, "data=faces", f"data.path={faces}", "data.target=age"],
            [*folder, f"data.path={images}/nowhere"],
        )
    )
    assert whole == pytest.approx(11_317_030 * 5 * 20, rel=1e-3)  # it has two classes, not ten
    assert thin == whole / 2
    assert thinner == 1e6 * 5 * 20
    assert whole < of_faces < nowhere == float("inf")


class FakeChild:
    """Ends when it is told to and not paused, after `slow` more looks at the clock."""

    def __init__(self, now: list[float], slow: int = 0, at: float = float("inf")) -> None:
        self.now, self.slow, self.at = now, slow, at
        self.signals: list[tuple[float, int]] = []

    def wait(self, seconds: float) -> bool:
        self.now[0] += seconds
        numbers = [number for _, number in self.signals]
        if signal.SIGTERM in numbers:
            self.slow -= 1
        return self.now[0] >= self.at or signal.SIGKILL in numbers or (signal.SIGTERM in numbers and self.slow < 0)

    def signal(self, number: int) -> None:
        self.signals.append((self.now[0], number))


@pytest.mark.parametrize(
    ("slow", "expected"),
    [(2, [(8.0, signal.SIGTERM)]), (100, [(8.0, signal.SIGTERM), (10.0, signal.SIGKILL)])],
)
def test_it_is_interrupted_in_time_and_killed_at_the_end(slow: int, expected: list[tuple[float, int]]) -> None:
    now = [0.0]
    child = FakeChild(now, slow)
    supervise(child, 8, 10, lambda: now[0], lambda: False)
    assert child.signals == expected


def test_it_pauses_while_it_must_but_not_beyond_its_time() -> None:
    now = [0.0]
    child = FakeChild(now, at=6)
    supervise(child, 8, 10, lambda: now[0], lambda: 2 <= now[0] < 4)
    assert child.signals == [(2.0, signal.SIGSTOP), (4.0, signal.SIGCONT)]
    now = [0.0]
    child = FakeChild(now)
    supervise(child, 8, 10, lambda: now[0], lambda: now[0] >= 3)
    assert child.signals == [(3.0, signal.SIGSTOP), (8.0, signal.SIGCONT), (8.0, signal.SIGTERM)]


def test_it_is_interrupted_with_its_parent() -> None:
    def stopped() -> bool:
        raise KeyboardInterrupt

    now = [0.0]
    child = FakeChild(now, slow=3)
    with pytest.raises(KeyboardInterrupt):
        supervise(child, 8, 10, lambda: now[0], stopped)
    assert [number for _, number in child.signals] == [signal.SIGTERM, signal.SIGCONT]
    assert child.slow < 0  # it was waited for


def test_a_benchmark_is_seen_while_it_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TKN_CACHE_DIR", str(tmp_path / "cache"))
    assert not benchmark_runs()
    with alone():
        assert benchmark_runs()
    assert not benchmark_runs()

    def no_locks(*_: object, **__: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    with alone():
        assert not benchmark_runs()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No benchmark of another test is waited for."""
    monkeypatch.setattr(filling, "benchmark_runs", lambda: False)


def clock_until(done: Callable[[], bool]) -> Callable[[], float]:
    """Of 100 seconds 90 are over as soon as `done()`."""
    return lambda: 90.0 if done() else 0.0


@pytest.mark.usefixtures("no_waiting")
def test_a_run_is_stopped_and_goes_on_and_then_comes_the_next_seed(tmp_path: Path) -> None:
    rows = find_rows(ROW, SMALL)
    first, second = (tmp_path / ROW / f"seed{seed}" for seed in (0, 1))
    fill(rows, tmp_path, 100, clock_until((first / "metrics.csv").is_file))
    summary = first / "summary.json"
    if not summary.is_file():  # it may have been as good as done
        assert (first / "last.ckpt").is_file()
    fill(rows, tmp_path, 100, clock_until(second.is_dir))
    assert json.loads(summary.read_text())["epochs"] == 2
    assert json.loads(summary.read_text())["experiment"] == ROW
    assert not (second / "summary.json").is_file()


@pytest.mark.usefixtures("no_waiting")
def test_a_run_begins_with_another_rows_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = row_after(ROW, "warm")
    summary = tmp_path / "kept" / "warm" / "seed0" / "summary.json"
    fill(rows, Path("kept"), 100, lambda: 0.0, seeds=1)
    assert summary.is_file()
    config = OmegaConf.load(summary.with_name("config.yaml"))
    assert config.model.weights == f"kept/{ROW}/seed0/last.ckpt"


@pytest.mark.usefixtures("no_waiting")
def test_rows_without_data_are_named_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = find_rows("table6_*", [f"data_dir={tmp_path / 'nothing'}"])
    fill(rows, tmp_path / "results", 100, lambda: 0.0)
    said = [line for line in capfd.readouterr().err.splitlines() if "left: " in line]
    assert len(said) == 1
    assert said[0].startswith("tkn.sweep.fill: left: table6_dn40, table6_tdn40_cauchy: ")
    assert "pain" in said[0]
    assert not list(tmp_path.rglob("summary.json"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--experiments", "table9*"), "--experiments 'table9*' matches none of "),
        (("--experiments", ROW, "--", "trainer.max_epoch=1"), "did you mean 'trainer.max_epochs'?"),
        (("--experiments", ROW, "--", "seed=1"), "seed=1: the experiments, seeds and folds are chosen here"),
        (("--experiments", ROW, "--", "data.fold=1"), "data.fold=1: the experiments, seeds and folds are chosen here"),
    ],
)
def test_wrong_arguments(wrong_arguments: Callable[..., str], arguments: tuple[str, ...], said: str) -> None:
    line = wrong_arguments(main, "results", "--seconds", "5", *arguments)
    assert line.startswith("tkn.sweep.fill: error: ")
    assert said in line


def test_the_command(tmp_path: Path) -> None:
    """Three seconds are over before a run has begun to train: it stops, and says nothing of failure."""
    code = "from tkn.sweep.fill import main; main()"
    process = ForkedPython(code, "results", "--seconds", "3", "--experiments", ROW, "--", *SMALL, folder=tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0
    assert f"results/{ROW}/seed0: tkn-run experiment={ROW}" in output
