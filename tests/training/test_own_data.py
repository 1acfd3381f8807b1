"""Runs on a user's own images, through the real command."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from own_images import face_rows, write_faces, write_folder
from runs import assert_same_run, metrics_rows

import tkn
from tkn.app.signals import Interrupted
from tkn.cli import compose
from tkn.training.module import TargetedTraining

#: Small and short.
BASE = ("model=tdn10", "recipe.batch_size=8", "trainer.max_epochs=2", "trainer.accelerator=cpu")


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "parts", {"train/bad": 12, "train/good": 10, "test/bad": 4, "test/good": 4})
    return "parts"


def test_a_path_of_digits_is_quoted(parts: str, tmp_path: Path) -> None:
    (tmp_path / parts).rename(tmp_path / "2024")
    arguments = (*BASE, "trainer.max_epochs=1", "data=folder", 'data.path="2024"', "data.size=16")
    summary, _ = tkn.run(compose(*arguments), tmp_path / "run")
    assert summary["data_source"].startswith("own: 2024, ")


def test_brackets_in_a_path_are_no_markup(parts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q[").mkdir()
    (tmp_path / parts).rename(tmp_path / "q[" / "b]")
    arguments = (*BASE, "trainer.max_epochs=1", "data=folder", "data.path='q[/b]'", "data.size=16")
    tkn.run(compose(*arguments), tmp_path / "run")
    assert capsys.readouterr().out.count("own: q[/b], 22 images to train") == 2  # both tables


def test_a_folder(parts: str, tmp_path: Path) -> None:
    summary, objects = tkn.run(compose(*BASE, "data=folder", f"data.path={parts}", "data.size=16"), tmp_path / "run")
    assert summary["data_source"] == "own: parts, 22 images to train and 8 to test, 2 classes"
    assert (summary["train_images"], summary["test_images"]) == (22, 8)
    assert objects["data"].classes == ("bad", "good")
    assert objects["data"].preparation.input_size == (3, 16, 16)


AUGMENT = ("data.augment.flip=true", "data.augment.shift=0.1", "data.augment.crop=0.8")


def test_images_from_files_train_as_those_in_memory(parts: str, tmp_path: Path) -> None:
    arguments = (*BASE, "data=folder", f"data.path={parts}", "data.size=16", *AUGMENT)
    tkn.run(compose(*arguments), tmp_path / "memory")
    tkn.run(compose(*arguments, "data.memory=0", "data.workers=2"), tmp_path / "files")
    assert_same_run(tmp_path / "memory", tmp_path / "files")
    # How images are read does not make it another run.
    again, _ = tkn.run(compose(*arguments, "data.memory=0"), tmp_path / "memory")
    assert again == json.loads((tmp_path / "memory" / "summary.json").read_text())


@pytest.mark.parametrize("memory", [4, 0])
def test_a_continued_run_augments_as_an_uninterrupted_one(
    parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    arguments = (*BASE, "data=folder", f"data.path={parts}", "data.size=16", f"data.memory={memory}", *AUGMENT)
    tkn.run(compose(*arguments), tmp_path / "whole")
    original, steps = TargetedTraining.training_step, 0

    def signalling(self: TargetedTraining, *args: Any) -> torch.Tensor | None:
        nonlocal steps
        steps += 1
        if steps == 5:  # in the middle of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TargetedTraining, "training_step", signalling)
        with pytest.raises(Interrupted):
            tkn.run(compose(*arguments), tmp_path / "halves")
    assert torch.load(tmp_path / "halves" / "last.ckpt", weights_only=True)["global_step"] == 5
    tkn.run(compose(*arguments), tmp_path / "halves")
    assert_same_run(tmp_path / "halves", tmp_path / "whole")


def test_folds_and_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "parts", {"bad": 20, "good": 20}, size=(16, 16))
    arguments = (*BASE, "trainer.max_epochs=1", "data=folder", "data.path=parts", "data.folds=4", "data.fold=3")
    summary, _ = tkn.run(compose(*arguments, "data.validation=6", "data.limit=24"), tmp_path / "run")
    assert (summary["train_images"], summary["test_images"], summary["best_chosen_on"]) == (18, 10, "valid")
    assert summary["data_source"] == (
        "partial: data.limit=24 of own: parts, 30 images to train and 10 to test, 2 classes, fold 3 of 4, seed 0"
    )


def test_faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_faces(tmp_path / "people", face_rows(24), without=("split",))
    arguments = (*BASE, "data=faces", "data.path=people", "data.target=age", "data.task=regression", "data.size=16")
    summary, _ = tkn.run(compose(*arguments, "data.folds=4"), tmp_path / "run")
    assert summary["mse"] > 0
    assert len(metrics_rows(tmp_path / "run")) == 2
    with pytest.raises(ValueError, match=r"data\.validation=2 must be 0 where images come in groups"):
        tkn.run(compose(*arguments, "data.folds=4", "data.validation=2"), tmp_path / "held_out")
    with pytest.raises(ValueError, match=r"recipe\.label_smoothing=0\.1 must be 0: a regression has no labels"):
        tkn.run(compose(*arguments, "data.folds=4", "recipe.label_smoothing=0.1"), tmp_path / "smooth")


def _documented() -> str:
    """The example in docs/data.md."""
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(# my_shapes\.py\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_shapes.py").write_text(f"{_documented()}\n\ndef wrong(data_dir):\n    return [1, 2]\n")
    arguments = (*BASE, "data=python", "data.factory=my_shapes:load")
    summary, objects = tkn.run(compose(*arguments, "+data.options.count=32"), tmp_path / "run")
    assert summary["data_source"] == "own: my_shapes:load (32 made halves)"
    assert (summary["train_images"], summary["test_images"]) == (24, 8)
    assert objects["data"].classes == ("left", "right")
    for factory, message in (
        ("my_shapes", r"data\.factory=my_shapes must be package\.module:function"),
        ("my_shape:load", r"data\.factory=my_shape:load: my_shape can't be imported \(ModuleNotFoundError"),
        ("my_shapes:lod", "my_shapes has no function lod"),
        ("my_shapes:wrong", r"must return a tkn\.data\.DataSet, not list"),
    ):
        with pytest.raises(ValueError, match=message):
            tkn.run(compose(*BASE, "data=python", f"data.factory={factory}"), tmp_path / "failed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data=folder",), r"key 'data\.path' is missing"),
        (("data=folder", "data.path=parts", "+data.sise=3"), "unknown key of data=folder 'sise'; did you mean 'size'"),
        (("data=folder", "data.path=parts", "data.size=big"), r"data\.size='big' must be of type"),
        (("data=folder", "data.path=parts", "+data.augment.flop=true"), "'augment.flop'; did you mean 'augment.flip'"),
        (
            ("data=folder", "data.path=parts", "data.augment.shift=far"),
            r"data\.augment\.shift='far' must be of type",
        ),
        (
            ("data=folder", "data.path=parts", "data.augment=null"),
            r"^data\.augment=None must have the keys flip, flip_vertical, shift, crop$",
        ),
        (
            ("data=folder", "data.path=2024"),
            r"""^data\.path=2024 must be of type str: quote it, for the shell too, as in 'data\.path="2024"'$""",
        ),
        (("data=folder", "data.path=parts", "data.normalise=1"), r"""must be of type str \| None: quote it, for"""),
        (("data=folder", "data.path=null"), r"^data\.path=None must be of type str$"),
        (("data=python", "data.factory=a:b", "data.options.n=1"), r"write \+data\.options\.n=\.\.\. to add it"),
        (("data=faces", "data.path=people"), r"key 'data\.target' is missing"),
        (("data=faces", "data.path=p", "data.target=a", "data.mirror=[[1,2.5]]"), r"data\.mirror=.* must be of type"),
    ],
)
def test_wrong_options_stop_at_once(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tkn.run(compose(*arguments), tmp_path / "run")
    assert not (tmp_path / "run").exists()
