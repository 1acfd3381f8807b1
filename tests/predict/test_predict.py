"""tkn-predict from a plan's file and image files to a table or CSV, and on what is wrong with either."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tkn
from tkn.data.preparation import Preparation
from tkn.predict.cli import main

PREPARATION = Preparation(3, (8, 6), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
CLASSES = ["cat", "dog", "émeu"]


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 48, outputs)).eval()


def write_plan(path: Path, outputs: int = 3, size: tuple[int, int, int] = (3, 8, 6), **notes: Any) -> Path:
    tkn.accelerate(network(outputs), 1, size, **notes).save(path)
    return path


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "model.plan"
    return write_plan(path, classes=CLASSES, preprocessing=PREPARATION.to_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of several formats and sizes, one of them in a folder of its own."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    rng = np.random.default_rng(0)
    names = ("a.png", "b.jpg", "c.bmp", "d.PNG", "more/e.png")
    for name, side in zip(names, (6, 20, 8, 30, 9), strict=True):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name)
    return folder


def expected(path: Path) -> Tensor:
    """The probabilities of the classes, by torch."""
    with Image.open(path) as image, torch.no_grad():
        return network()(PREPARATION(image)[None])[0].softmax(0)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_writes_csv(plan: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    main([str(plan), str(folder), "--csv", str(out), "--top", "2", "--batch", "2"])
    found = rows(out)
    assert [Path(row["file"]).name for row in found] == ["a.png", "b.jpg", "c.bmp", "d.PNG", "e.png"]
    for row in found:
        scores, order = expected(Path(row["file"])).sort(descending=True)
        assert [row["class"], row["class_2"]] == [CLASSES[index] for index in order[:2]]
        assert [float(row["score"]), float(row["score_2"])] == pytest.approx(scores[:2].tolist(), abs=1e-4)


def test_the_command_prints_a_table_and_needs_neither_lightning_nor_hydra(plan: Path, folder: Path) -> None:
    code = (
        "import sys; from tkn.predict.cli import main; main(sys.argv[1:]);"
        "heavy = {'pytorch_lightning', 'hydra', 'omegaconf', 'torchvision', 'scipy', 'matplotlib', 'mlxtend'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    command = [sys.executable, "-c", code, str(plan), str(folder / "a.png"), str(folder / "b.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    likeliest = expected(folder / "a.png")
    assert CLASSES[int(likeliest.argmax())] in done.stdout
    assert f"{float(likeliest.max()):.4g}" in done.stdout


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\x1b[31mred.png"])
def test_names_that_a_terminal_would_act_on(
    name: bytes, plan: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / os.fsdecode(name)
    odd.write_bytes((folder / "a.png").read_bytes())
    main([str(plan), str(odd), "--csv", str(tmp_path / "out.csv")])
    (row,) = rows(tmp_path / "out.csv")
    assert row["file"].endswith((r"caf\udce9.png", r"\x1b[31mred.png"))
    odd.write_bytes(b"")
    with pytest.raises(SystemExit):
        main([str(plan), str(odd)])
    assert row["file"] in capsys.readouterr().err


def test_a_regression_tells_numbers(folder: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "model.plan", 1, preprocessing=PREPARATION.to_dict())
    main([str(plan), str(folder / "c.bmp"), "--csv", str(tmp_path / "out.csv")])
    (row,) = rows(tmp_path / "out.csv")
    with Image.open(folder / "c.bmp") as image, torch.no_grad():
        value = float(network(1)(PREPARATION(image)[None]))
    assert row.keys() == {"file", "value"}
    assert float(row["value"]) == pytest.approx(value, abs=1e-3)


def test_classes_without_names_are_their_numbers(folder: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "model.plan", preprocessing=PREPARATION.to_dict())
    main([str(plan), str(folder / "a.png"), "--csv", str(tmp_path / "out.csv")])
    (row,) = rows(tmp_path / "out.csv")
    assert row["class"] == str(int(expected(folder / "a.png").argmax()))


def test_other_images_are_predicted_beside_wrong_ones(
    plan: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    still = Image.fromarray(np.zeros((4, 4), np.uint8))
    still.save(tmp_path / "moves.gif", save_all=True, append_images=[Image.fromarray(np.full((4, 4), 9, np.uint8))])
    still.save(tmp_path / "exif.jpg", dpi=(72, 72), exif=b"Exif\0\0garbage!")
    Image.fromarray(np.zeros((4, 4, 4), np.uint8), "CMYK").save(tmp_path / "print.jpg")  # Pillow converts it
    wrong = {"empty.png", "text.png", "cut.png", "deep.png", "moves.gif", "exif.jpg", "missing.png"}
    out = tmp_path / "out" / "out.csv"
    out.parent.mkdir()
    paths = [*sorted(tmp_path.glob("*.*")), tmp_path / "missing.png", folder / "a.png"]
    with pytest.raises(SystemExit) as stopped:
        main([str(plan), *map(str, paths), "--csv", str(out), "--batch", "3"])
    assert stopped.value.code == 1
    assert [Path(row["file"]).name for row in rows(out)] == ["print.jpg", "a.png"]
    lines = capsys.readouterr().err.splitlines()
    assert {name for name in wrong for line in lines if line.startswith("tkn-predict: ") and name in line} == wrong
    assert len(lines) == len(wrong)


def test_nothing_is_written_where_no_image_can_be_read(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(plan), str(tmp_path / "no.png"), "--csv", str(tmp_path / "out.csv")])
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({}, "does not say how an image becomes its input: tkn-export writes that"),
        ({"preprocessing": {"size": [8, 6]}}, "preparation: .* must have the keys channels, mean, size, std"),
        ({"preprocessing": {**PREPARATION.to_dict(), "size": [8, 7]}}, r"of \(3, 8, 7\), but its network takes"),
        ({"preprocessing": {**PREPARATION.to_dict(), "std": [0, 1, 1]}}, "std=.* must be 3 positive numbers"),
        ({"preprocessing": {**PREPARATION.to_dict(), "size": "86"}}, "size, mean and std must be lists"),
        ({"classes": ["a", "a", "b"]}, "its classes must be a list of different printable names"),
        ({"classes": ["a", "\x1b[2J", "b"]}, "its classes must be a list of different printable names"),
        ({"classes": {"a": 1}}, "its classes must be a list of different printable names"),
        ({"classes": ["a", "b"]}, "has 2 names of classes for 3 outputs"),
    ],
    ids=["nothing", "keys", "size", "std", "text", "twice", "escape", "object", "too-few"],
)
def test_plans_that_say_nonsense(
    notes: dict[str, Any], message: str, folder: Path, wrong_arguments: Callable[..., str]
) -> None:
    if notes and "preprocessing" not in notes:
        notes = {"preprocessing": PREPARATION.to_dict(), **notes}
    plan = write_plan(folder.parent / "nonsense.plan", **notes)
    line = wrong_arguments(main, str(plan), str(folder / "a.png"))
    assert line.startswith(f"tkn-predict: error: {plan}")
    assert re.search(message, line), line


def test_other_wrong_arguments(plan: Path, folder: Path, wrong_arguments: Callable[..., str]) -> None:
    assert "is damaged or not a plan" in wrong_arguments(main, str(folder / "a.png"), str(folder))
    assert "is a folder, not a plan" in wrong_arguments(main, str(folder), str(folder))
    assert "No such file" in wrong_arguments(main, "no.plan", str(folder))
    assert "holds no image file" in wrong_arguments(main, str(plan), str(plan.parent))
    assert "--top 4" in wrong_arguments(main, str(plan), str(folder), "--top", "4")


def test_a_network_of_two_results_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, wrong_arguments: Callable[..., str]
) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.inner(x)
            return y, 2 * y

    path = tmp_path_factory.mktemp("two") / "two.plan"
    tkn.accelerate(Two().eval(), 1, (3, 8, 6), preprocessing=PREPARATION.to_dict()).save(path)
    assert "gives something else than one row of numbers" in wrong_arguments(main, str(path), str(folder))
