"""tkn-report from folders to files, on real runs and on bad input."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from made_runs import write_rois, write_run
from rich.console import Console

import tkn
from tkn.bench.measure import Sampling
from tkn.cli import compose
from tkn.data import load_data
from tkn.report import timing
from tkn.report.build import build_report
from tkn.report.cli import main
from tkn.report.figures import pictures
from tkn.report.runs.collect import collect
from tkn.report.timing import measure_timings, read_timings

TINY = ("data=mnist", "data.source=embedded", "data.limit=64", "recipe.batch_size=32", "trainer.limit_val_batches=1")
TINY = (*TINY, "trainer.limit_test_batches=1", "trainer.accelerator=cpu", "trainer.max_epochs=2", "engine=dense")


class _Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(autouse=True)
def _load_data_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "load_data", cache(load_data))


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of TDN10, and DN10."""
    folder = tmp_path_factory.mktemp("real")
    for seed in (0, 1):
        arguments = ("model=tdn10", "penalty.l2=0.5", f"seed={seed}")
        tkn.run(compose(*TINY, *arguments), folder / f"tdn10_{seed}")
    tkn.run(compose(*TINY, "model=dn10", "penalty=none"), folder / "dn10")
    return folder


def _build(paths: list[Path], folder: Path) -> str:
    text = StringIO()
    build_report(paths, folder, Path("no_data"), Console(file=text, width=120))
    return text.getvalue()


def test_the_command_reports_real_runs(real_runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tkn.report.cli", str(real_runs), "--out", str(out), "--data-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    figure4 = "figures/figure4_01_tdn10_mnist_cauchy_l2_0.5_beta_2"
    figures = ["figures/figure2_attention_functions", "figures/figure3_mnist", "figures/figure3_tlmnist"]
    figures += [figure4, "figures/figure5_operations"]
    expected = {f"{figure}.{suffix}" for figure in figures for suffix in ("png", "pdf")}
    assert names == {*expected, f"{figure4}.gif", "report.html", "report.md", "runs.csv", "groups.csv"}
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith(f"in {out}: ")
    assert set(last.removeprefix(f"in {out}: ").split(", ")) == names
    with (out / "groups.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["n"]) for row in rows] == [
        ("dn10 mnist", "1"),
        ("tdn10 mnist cauchy, l2 0.5, beta 2", "2"),
    ]
    errors = [json.loads((real_runs / f"tdn10_{seed}" / "summary.json").read_text())["error"] for seed in (0, 1)]
    assert float(rows[1]["error_mean"]) == pytest.approx(sum(errors) / 2)
    text = (out / "report.md").read_text()
    assert "## Not the whole data set: partial: data.limit=64" in text
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (out / link).is_file(), link


def test_the_page_needs_no_other_file(real_runs: Path, tmp_path: Path) -> None:
    bad = write_run(tmp_path / "runs" / "<b>bad</b>", seed=3)
    (bad / "summary.json").write_text("{")
    _build([real_runs, tmp_path / "runs"], tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    page = _Page(text)
    images = page.all("img")
    assert len(images) == 6
    assert all((image["src"] or "").startswith("data:image/") and image["alt"] for image in images)
    assert "http" not in re.sub(r"data:image/[^\"]*", "", text)
    assert not page.all("script")
    assert not page.all("link")
    assert "<b>" not in text
    assert "&lt;b&gt;bad" in text
    assert len(page.all("h1")) == 1
    anchors = {(link["href"] or "").removeprefix("#") for link in page.all("a")}
    identities = [tag["id"] for name in ("h2",) for tag in page.all(name)]
    assert anchors == set(identities)
    assert len(identities) == len(set(identities))
    assert page.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in text


def test_a_report_repeats_and_is_no_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_rois(write_run(runs / "run"), epochs=2)
    first, second = runs / "report", tmp_path / "second"
    _build([runs], first)
    stale = second / "figures" / "figure4_09_gone.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    _build([runs], second)  # with the first report among the runs
    names = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert names == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    assert len(names) == 15
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_time_is_measured_once_and_used_later(real_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SAMPLING", Sampling(rounds=1, repeats=2, seconds=0, warmup=0))
    runs, _ = collect([real_runs])
    assert measure_timings(runs, 2, tmp_path) == []
    timings = read_timings(tmp_path)
    assert timings is not None
    assert (timings["batch_size"], timings["machine"]["usable_cpus"] >= 1) == (2, True)
    assert [(row["model"], row["folder"] is None) for row in timings["rows"]] == [
        ("dn10", True),
        ("tdn10", False),
        ("tdn10", False),
    ]
    assert all(row["seconds"]["n"] >= 2 and row["seconds"]["median"] > 0 for row in timings["rows"])
    assert "batch 2, threads: " in _build([real_runs], tmp_path)
    assert (tmp_path / "figures" / "figure5_time.png").exists()
    assert read_timings(tmp_path) == timings


def test_the_command_measures_time(real_runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int | None] = []

    def build(
        _paths: list[Path], folder: Path, _data_dir: Path, _console: Console, *asked_for: int | None
    ) -> list[Path]:
        assert asked_for[1] is None
        asked.append(asked_for[0])
        return [folder / "report.html"]

    monkeypatch.setattr("tkn.report.build.build_report", build)
    for arguments in ([], ["--time"], ["--time", "--batch-size", "3"], ["--batch-size", "3"]):
        main([str(real_runs), "--out", str(tmp_path), *arguments])
    assert asked == [None, 128, 3, None]


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{}]}', '{"rows": []}'])
def test_damaged_timings_are_errors(tmp_path: Path, content: str) -> None:
    (tmp_path / "timings.json").write_text(content)
    with pytest.raises(ValueError, match=r"timings\.json (cannot be read|is not a file of timings)"):
        read_timings(tmp_path)


def test_damaged_timings_are_noted(tmp_path: Path) -> None:
    (tmp_path / "timings.json").write_text("{")
    write_run(tmp_path / "run", "penalty=none", model="dn10")
    assert "measure anew with --time" in _build([tmp_path / "run"], tmp_path)
    assert not (tmp_path / "figures" / "figure5_time.png").exists()


def test_old_runs_are_drawn_from_their_checkpoint(real_runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("summary.json", "last.ckpt"):
        (folder / name).write_bytes((real_runs / "tdn10_0" / name).read_bytes())
    _build([folder], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "This run recorded no ROIs by epoch: only the checkpoint's are shown." in text
    assert not list((tmp_path / "report" / "figures").glob("*.gif"))


def test_runs_without_checkpoints_cannot_be_timed(tmp_path: Path) -> None:
    missing = write_run(tmp_path / "a")
    damaged = write_run(tmp_path / "b", seed=1) / "last.ckpt"
    damaged.write_bytes(b"nothing")
    empty = write_run(tmp_path / "c", seed=2) / "last.ckpt"
    empty.write_bytes(b"")
    first, second, third, last = measure_timings(collect([tmp_path])[0], 2, tmp_path)
    assert first == f"{missing} is not timed: {missing / 'last.ckpt'} is not a file"
    assert second.startswith(f"{damaged.parent} is not timed: {damaged} is damaged or not a checkpoint")
    assert third.startswith(f"{empty.parent} is not timed: {empty} is damaged or not a checkpoint")
    assert last == "no counted run has target layers and a checkpoint: nothing is timed"
    assert read_timings(tmp_path) is None


def test_failed_runs_alone_are_reported_too(tmp_path: Path) -> None:
    (tmp_path / "tkn-run.log").write_text("10:00:01 ERROR the loss became nan\n")
    text = _build([tmp_path], tmp_path / "report")
    assert "the loss became nan" in text
    assert "1 run found, 0 counted in 0 rows" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(("paths", "folder"), [(["one"], "one/report"), (["one", "two"], "report")])
def test_the_report_is_in_the_one_folder_or_here(
    monkeypatch: pytest.MonkeyPatch, paths: list[str], folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tkn.report.build.build_report", lambda _paths, out, *_: [out / "report.html"])
    main(paths)
    assert capsys.readouterr().out == f"in {folder}: report.html\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing does not exist"),
        (["file"], "file is not a folder"),
        (["empty"], "no run in empty: nothing to report"),
        (["empty", "also_empty"], "no run in empty, also_empty: nothing to report"),
        (["run", "--out", "file"], "file"),
    ],
)
def test_bad_paths_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("empty").mkdir()
    Path("also_empty").mkdir()
    write_run(Path("run"))
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    text = str(exit_.value.code)
    assert text.startswith("tkn-report: error: ")
    assert message in text
    assert "\n" not in text
    assert not Path("empty/report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PATH"),
        (["run", "--batch-size", "0"], "'0' is not a whole number, at least 1"),
        (["run", "--batch-size", "many"], "'many' is not a whole number"),
        (["run", "--tiem"], "--tiem"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
