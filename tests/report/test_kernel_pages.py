"""tkn-report --kernels, from runs to pages."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import write_run
from rich.console import Console
from torch import nn

import tkn
from tkn.cli import compose
from tkn.data import load_data
from tkn.layers import roi_layers
from tkn.report.cli import main
from tkn.report.kernels.pages import kernel_pages
from tkn.report.runs.collect import collect
from tkn.report.runs.groups import sections
from tkn.report.runs.roi_states import trained_model
from tkn.report.runs.run import Run

TINY = (
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
)
TINY = (*TINY, "penalty.l2=0.5", "engine=dense")
DIGITS = (*TINY, "data=mnist", "data.source=embedded", "data.limit=64", "recipe.batch_size=32")
FACES = (*TINY, "data=pain_synthetic", "data.subjects=3", "data.sequences=1", "data.frames=4", "data.test_subjects=1")
NAME = "kernels_01_tdn10_mnist_cauchy_l2_0.5_beta_2"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    tkn.run(compose(*DIGITS, "model=tdn10"), folder / "run")
    (folder / "run" / "rois.npz").unlink()  # an animation would take time
    return folder


def _pages(runs: Path, folder: Path, data_dir: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The pages of the runs below a folder on 8 images, and what could not be shown."""
    notes: list[str] = []
    rows = sections(collect([runs])[0])
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    return kernel_pages(rows, folder, data_dir, 8, Console(file=StringIO()), notes), notes


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_command_writes_a_page(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tkn.report.cli", str(digits), "--out", str(out), "--data-dir", str(tmp_path)]
    done = subprocess.run([*command, "--kernels", "--images", "40"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    names = set(done.stdout.strip().splitlines()[-1].removeprefix(f"in {out}: ").split(", "))
    figures = {path for path in names if path.startswith("figures/kernels_")}
    parts = ["coverage", *(f"layer{number:02}" for number in range(1, 7))]
    assert figures == {f"figures/{NAME}_{part}.{suffix}" for part in parts for suffix in ("png", "pdf")}
    assert all((out / name).is_file() for name in names)
    assert {f"{NAME}.html", f"{NAME}.csv"} < names
    assert f'<a href="{NAME}.html">Kernels of tdn10 mnist cauchy' in (out / "report.html").read_text()
    assert f"]({NAME}.html)" in (out / "report.md").read_text()
    page = (out / f"{NAME}.html").read_text()
    assert "<title>Kernels of tdn10 mnist cauchy, l2 0.5, beta 2, seed 0</title>" in page
    assert '<a href="report.html">The report</a>' in page
    assert "on 40 test images, evenly among 1,000" in page
    assert page.count("data:image/png") == 7
    assert "Where on the face" not in page
    assert "Notes" not in page
    kernels = re.findall(rf'<th scope="row"><a href="#({NAME}_layer0\d)">', page)
    assert len(kernels) == 18
    assert all(f'<h2 id="{anchor}">' in page for anchor in kernels)
    errors = [float(rise) for rise in re.findall(r'data-label="error rises by">(\S+) points', page)]
    assert errors == sorted(errors, reverse=True)
    assert "block1.0 conv1 without its kernels, layer 1 of 6" in done.stdout

    rows = _rows(out / f"{NAME}.csv")
    model = tkn.load_model(digits / "run" / "last.ckpt")
    data = load_data("mnist", tmp_path, source="embedded")
    indices = torch.arange(40) * 999 // 39
    images, targets = data.inputs(data.test.select(indices)), data.test.targets[indices]
    with torch.no_grad():
        before = 100 * (model(images).argmax(dim=1) != targets).double().mean().item()
        layers = roi_layers(model)
        assert [row["layer"] for row in rows] == [name for name in layers for _ in range(12)]
        for row in rows[::7]:
            layer, kernel = layers[row["layer"]], int(row["kernel"])
            (top, bottom), (left, right) = layer.rois(layer.map_size)[kernel].tolist()
            edges = [int(row[f"roi_{edge}"]) for edge in ("top", "bottom", "left", "right")]
            assert edges == [top, bottom, left, right]
            weights = layer.weight.clone()
            layer.weight[kernel] = 0
            after = 100 * (model(images).argmax(dim=1) != targets).double().mean().item()
            layer.weight.copy_(weights)
            assert float(row["error_rise"]) == pytest.approx(after - before, abs=1e-4)


def test_pages_of_an_earlier_report(digits: Path, tmp_path: Path) -> None:
    stale = [tmp_path / "kernels_09_gone.html", tmp_path / "figures" / "kernels_09_gone_coverage.png"]
    own = tmp_path / "kernels_of_mine.html"
    (tmp_path / "figures").mkdir()
    for path in (*stale, own):
        path.write_text("")
    written, notes = _pages(digits, tmp_path, tmp_path)
    assert notes == []
    assert list(written) == ["Kernels of tdn10 mnist cauchy, l2 0.5, beta 2, seed 0"]
    assert {*tmp_path.rglob("kernels_*")} == {own, *(path for made in written.values() for path in made)}
    first = {path: path.read_bytes() for path in tmp_path.rglob("kernels_*")}
    _pages(digits, tmp_path, tmp_path)
    assert first == {path: path.read_bytes() for path in tmp_path.rglob("kernels_*")}


def test_faces_have_a_table_of_their_parts(tmp_path: Path) -> None:
    tkn.run(compose(*FACES, "model=tdn10", f"data_dir={tmp_path}"), tmp_path / "runs")
    ((page, table, *_),) = _pages(tmp_path / "runs", tmp_path / "report", tmp_path)[0].values()
    text = page.read_text()
    assert ">Where on the face</h2>" in text
    assert "MSE rises by" in text
    assert "percentage points of error" not in text
    assert "all 4 test images" in text
    rows = _rows(table)
    assert len(rows) == 72
    for row in rows:
        assert 0 <= sum(float(row[part]) for part in ("brows", "eyes", "nose", "mouth")) <= 1


def _changed(run: Path, folder: Path, **data: str) -> Path:
    """A copy of a run whose checkpoint says that it was trained on other data."""
    shutil.copytree(run, folder)
    content = torch.load(folder / "last.ckpt", weights_only=True)
    content["tkn"]["config"]["data"] = data
    torch.save(content, folder / "last.ckpt")
    summary = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text(summary.replace("embedded: ", "other: "))
    return folder


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"name": "pain"},
            "its data cannot be loaded: .*Images: the UNBC-McMaster pain archive is expected here",
        ),
        (
            {"name": "tlmnist", "source": "embedded"},
            r"the data are of \(1, 56, 56\) and 10 outputs, the network ",
        ),
        ({"name": "python", "factory": "os:remove"}, "a report runs no code of a run's, which data=python needs"),
    ],
)
def test_what_is_missing_is_said(digits: Path, tmp_path: Path, data: dict[str, str], message: str) -> None:
    run = _changed(digits / "run", tmp_path / "run", **data)
    written, (note,) = _pages(run, tmp_path / "out", tmp_path / "empty")
    assert written == {}
    assert re.match(f"No kernels of {re.escape(str(run))}: {message}", note)


def test_layers_that_cannot_be_shown_are_named(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_more(run: Run) -> tuple[nn.Module, dict[str, Any]]:
        model, identity = trained_model(run)
        model.fc.beside = tkn.TargetConv2d(1, 1, 3)
        model.fc.series = tkn.TargetConv1d(1, 1, 3)
        model.fc.series(torch.zeros(1, 1, 5))
        return model, identity

    monkeypatch.setattr("tkn.report.kernels.look.trained_model", with_more)
    monkeypatch.setattr("tkn.report.kernels.pages._SHOWN", 1)
    ((page, *_),) = _pages(digits, tmp_path, tmp_path)[0].values()
    text = page.read_text()
    assert "<li>fc.beside is not shown: it is not run.</li>" in text
    assert "<li>fc.series is not shown: only maps of two dimensions are, and its have 1.</li>" in text


def test_runs_without_checkpoints_or_target_layers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "targeted")
    assert _pages(run, tmp_path / "out", tmp_path) == ({}, [f"No kernels of {run}: {run / 'last.ckpt'} is not a file"])
    dense = write_run(tmp_path / "dense", "penalty=none", model="dn10")
    assert _pages(dense, tmp_path / "out", tmp_path) == ({}, ["--kernels: no counted run has target layers"])


@pytest.mark.parametrize("images", ["0", "-1", "few"])
def test_wrong_numbers_of_images(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["run", "--kernels", "--images", images])
    assert exit_.value.code == 2
    assert "--images" in capsys.readouterr().err
