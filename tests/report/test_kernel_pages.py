"""tkn-report --kernels, from runs to pages."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from made_runs import write_run
from rich.console import Console

import tkn
from tkn.cli import compose
from tkn.data import load_data
from tkn.layers import roi_layers
from tkn.report.build import build_report
from tkn.report.cli import main

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
    return folder


def _build(path: Path, folder: Path, data_dir: Path, images: int | None = 8) -> str:
    text = StringIO()
    build_report([path], folder, data_dir, Console(file=text, width=120), None, images)
    return text.getvalue()


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
    _build(digits, tmp_path, tmp_path, None)
    assert all(path.exists() for path in stale)
    _build(digits, tmp_path, tmp_path)
    assert not any(path.exists() for path in stale)
    assert own.exists()
    first = {path: path.read_bytes() for path in tmp_path.rglob("kernels_*")}
    _build(digits, tmp_path, tmp_path)
    assert first == {path: path.read_bytes() for path in tmp_path.rglob("kernels_*")}


def test_faces_have_a_table_of_their_parts(tmp_path: Path) -> None:
    tkn.run(compose(*FACES, "model=tdn10", f"data_dir={tmp_path}"), tmp_path / "runs")
    _build(tmp_path / "runs", tmp_path / "report", tmp_path)
    (page,) = (tmp_path / "report").glob("kernels_01_*.html")
    text = page.read_text()
    assert ">Where on the face</h2>" in text
    assert "MSE rises by" in text
    assert "percentage points of error" not in text
    assert "all 4 test images" in text
    rows = _rows(page.with_suffix(".csv"))
    assert len(rows) == 72
    for row in rows:
        assert 0 <= sum(float(row[part]) for part in ("brows", "eyes", "nose", "mouth")) <= 1


def test_what_is_missing_is_said(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    write_run(runs / "no_checkpoint")
    shutil.copytree(digits / "run", runs / "no_data")
    summary, checkpoint = runs / "no_data" / "summary.json", runs / "no_data" / "last.ckpt"
    summary.write_text(summary.read_text().replace('"embedded: ', '"full: '))
    content = torch.load(checkpoint, weights_only=True)
    content["tkn"]["config"]["data"] |= {"name": "pain", "source": None}
    del content["tkn"]["config"]["data"]["source"]
    torch.save(content, checkpoint)
    main([str(runs), "--kernels", "--images", "8", "--data-dir", str(tmp_path / "empty")])
    notes = [line for line in capsys.readouterr().out.splitlines() if "No kernels of" in line]
    assert f"No kernels of {runs / 'no_checkpoint'}: {runs / 'no_checkpoint' / 'last.ckpt'} is not a file" in notes[0]
    assert f"No kernels of {runs / 'no_data'}: its data cannot be loaded: {tmp_path / 'empty' / 'pain'}" in notes[1]
    assert not list((runs / "report").glob("kernels_*"))


def test_data_of_other_sizes_and_of_code_are_refused(digits: Path, tmp_path: Path) -> None:
    for name, changes, message in (
        (
            "sizes",
            {"name": "tlmnist"},
            r"the data are of (1, 56, 56) and 10 outputs, the network of (1, 28, 28) and 10",
        ),
        ("code", {"name": "python"}, "a report runs no code of a run's, which data=python needs"),
    ):
        shutil.copytree(digits / "run", tmp_path / name)
        checkpoint = tmp_path / name / "last.ckpt"
        content = torch.load(checkpoint, weights_only=True)
        content["tkn"]["config"]["data"] |= changes
        torch.save(content, checkpoint)
        assert f"note: No kernels of {tmp_path / name}: {message}" in _build(
            tmp_path / name, tmp_path / "out", tmp_path
        )


def test_dense_runs_have_no_kernels_to_look_at(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "penalty=none", model="dn10")
    assert "note: --kernels: no counted run has target layers" in _build(tmp_path / "run", tmp_path / "out", tmp_path)


@pytest.mark.parametrize("images", ["0", "-1", "few"])
def test_wrong_numbers_of_images(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["run", "--kernels", "--images", images])
    assert exit_.value.code == 2
    assert "--images" in capsys.readouterr().err
