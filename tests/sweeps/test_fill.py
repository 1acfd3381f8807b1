"""`tkn.sweep.fill`: what it runs next, how it stops in time, and that it goes on where it stopped."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from forked import ForkedPython

from tkn.bench.alone import alone, benchmark_runs
from tkn.sweep import fill as filling
from tkn.sweep.child import Failure, supervise
from tkn.sweep.fill import fill, main
from tkn.sweep.rows import Row, find_rows, next_run

ROW = "table2_dn10"
SMALL = ("data.source=embedded", "data.limit=64", "recipe.batch_size=32", "trainer.accelerator=cpu")
SMALL = (*SMALL, "trainer.max_epochs=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1")


def finish(results: Path, experiment: str, seed: int) -> None:
    """Leave what a finished run leaves."""
    folder = results / experiment / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")


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


def test_a_seed_that_failed_does_not_block_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = find_rows("table[23]_dn10", [])
    tried = []

    class Failing:
        """A run's process that has ended."""

        def __init__(self, _arguments: tuple[str, ...], folder: Path) -> None:
            tried.append(folder.relative_to(tmp_path).as_posix())
            (folder / "last.ckpt").touch()

        def failure(self) -> Failure:
            return Failure("it diverged", missing=False)

    monkeypatch.setattr(filling, "RunProcess", Failing)
    monkeypatch.setattr(filling, "supervise", lambda *_: None)
    fill(rows, tmp_path, 100.0, clock=lambda: 0.0)
    assert tried == [f"{name}/seed{seed}" for name in ("table2_dn10", "table3_dn10") for seed in (0, 1)]
    said = capfd.readouterr().err.splitlines()
    assert [line.split(": ")[2].rsplit("/", 1)[-1] for line in said] == ["seed0", "table2_dn10", "seed0", "table3_dn10"]


def test_work_follows_the_overrides() -> None:
    (whole,), (part,) = find_rows(ROW, []), find_rows(ROW, ["data.limit=600", "trainer.max_epochs=2"])
    assert whole.work == 1000 * part.work
    assert whole.run(3) == (f"experiment={ROW}", "seed=3")
    assert part.run(0) == (f"experiment={ROW}", "data.limit=600", "trainer.max_epochs=2", "seed=0")


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
        (("--experiments", ROW, "--", "seed=1"), "seed=1: the experiments and seeds are chosen here"),
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
