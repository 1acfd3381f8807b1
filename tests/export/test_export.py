"""tkn-export and tkn-predict on runs of tkn-run, and on runs that can't be exported."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import tkn
from tkn.bench import measure
from tkn.cli import compose
from tkn.data.mnist import load_mnist
from tkn.export import build
from tkn.export.cli import main
from tkn.export.interval import of_mean, of_share
from tkn.predict.cli import main as predict
from tkn.training.records.checkpoint import checkpoint_network

SHORT = ("trainer.limit_val_batches=1", "trainer.accelerator=cpu", "trainer.max_epochs=1", "engine=dense")
TINY = ("data=mnist", "data.source=embedded", "data.limit=64", "recipe.batch_size=32", *SHORT)
QUICK = ("--seconds", "0", "--batch", "3")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_quiet", lambda: None)
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TDN10 whose ROIs have shrunk."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    tkn.run(compose(*TINY, "model=tdn10", "penalty.l2=30", "data.validation=16"), folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def change(path: Path, **values: Any) -> None:
    """Keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def refusal(run: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which tkn-export ends; it leaves nothing behind."""
    before = files(run)
    with pytest.raises(SystemExit) as stopped:
        main([str(run), *QUICK, *arguments])
    assert isinstance(stopped.value.code, str)
    assert "\n" not in stopped.value.code
    assert capsys.readouterr().out == ""
    assert files(run) == before
    return stopped.value.code.removeprefix("tkn-export: error: ")


def test_a_run_becomes_a_plan_that_predicts_as_well(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tested"] == "best"
    assert summary["macs_roi"] < 0.6 * summary["macs_dense"]
    main([str(run), "--seconds", "0", "--batch", "2", "3"])
    shown = capsys.readouterr().out
    assert {"model.plan", "export.json", "export.md"} <= files(run)
    assert not [name for name in files(run) if name.startswith(".tkn")]

    content = json.loads((run / "export.json").read_text())
    error = content["network"]["errors"]["error"]
    assert error["value"] == pytest.approx(summary["error"], abs=1e-3)
    assert error["low"] < error["value"] < error["high"]
    assert (content["images"]["count"], content["images"]["whole"]) == (1000, 1000)
    assert (content["macs_dense"], content["macs_roi"]) == (summary["macs_dense"], summary["macs_roi"])
    assert (content["checkpoint"], content["parameters"]) == ("best.ckpt", summary["parameters"])
    for plan in content["plans"]:
        assert plan["errors"]["error"]["value"] == error["value"]
        assert plan["difference"] < 1e-4
        assert plan["other_classes"] == 0
    timed = {(row["network"], row["engine"], row["batch"]) for row in content["timings"]}
    assert {("dense", "torch", 2), ("targeted", "torch", 3), ("plan", "this engine", 2)} <= timed
    assert "OpenVINO is not timed: openvino is not installed (extra bench)" in content["notes"]
    for text in ("11.3M", "times as fast as the dense network by", "outputs differ from the network's by at most"):
        assert text in shown
        assert text in (run / "export.md").read_text()

    # The same images from files, without the training's code.
    data = load_mnist(Path("no_data"), source="embedded")
    folder = run.parent / "images"
    folder.mkdir()
    for index, image in enumerate(data.test.inputs[0][:200, 0].numpy()):
        Image.fromarray(image).save(folder / f"{index:03}.png")
    predict([str(run / "model.plan"), str(folder), "--csv", str(run / "out.csv")])
    with (run / "out.csv").open(newline="") as file:
        found = [int(row["class"]) for row in csv.DictReader(file)]
    network, _ = checkpoint_network(run / "best.ckpt")
    with torch.inference_mode():
        expected = network(data.test.inputs[0][:200].float() / 255).argmax(1)
    assert found == expected.tolist()


def test_a_part_of_the_images_and_another_file(run: Path, tmp_path: Path) -> None:
    main([str(run), *QUICK, "--images", "100", "--output", str(tmp_path / "net.plan"), "--data-dir", "no_data"])
    content = json.loads((tmp_path / "export.json").read_text())
    assert (content["images"]["count"], content["images"]["whole"]) == (100, 1000)
    assert "on 100 images, which lie evenly among 1,000" in (tmp_path / "export.md").read_text()
    assert "model.plan" not in files(run)
    assert tkn.load_plan(tmp_path / "net.plan").classes == list(map(str, range(10)))


def test_without_the_data(run: Path) -> None:
    main([str(run), *QUICK, "--unchecked"])
    content = json.loads((run / "export.json").read_text())
    assert content["network"]["errors"] == {}
    assert content["plans"][0]["difference"] < 1e-4
    plan = tkn.load_plan(run / "model.plan")
    assert (plan.classes, plan.preprocessing) == (None, None)
    assert "the data were not there" in content["notes"][0]


def test_a_regression_and_a_dense_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = ("data=pain_synthetic", "data.subjects=8", "data.sequences=1", "data.frames=2", "recipe.batch_size=4")
    monkeypatch.chdir(tmp_path)
    tkn.run(compose(*SHORT, *drawn, "model=dn10", f"data_dir={tmp_path}"), tmp_path / "run")
    main(["run", *QUICK])
    content = json.loads((tmp_path / "run" / "export.json").read_text())
    assert content["network"]["errors"].keys() == {"mse", "mae"}
    assert {row["network"] for row in content["timings"]} == {"dense", "plan"}
    assert any("needs more than an image" in note for note in content["notes"])
    with pytest.raises(SystemExit, match="does not say how an image becomes its input"):
        predict([str(tmp_path / "run" / "model.plan"), str(tmp_path / "run")])


SEVERAL = """
import torch
from tkn.data import DataSet, Preparation, Split

def load(data_dir, outputs=2):
    images = torch.randint(0, 256, (24, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    targets = torch.rand(24, outputs, generator=torch.Generator().manual_seed(1))
    parts = Split((images[8:],), targets[8:]), Split((images[:8],), targets[:8])
    return DataSet("points", "made", "regression", (1, 16, 16), outputs, *parts, preparation=Preparation(1, (16, 16)))
"""


@pytest.mark.parametrize("outputs", [1, 2])
def test_several_numbers_are_not_taken_for_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "several_numbers.py").write_text(SEVERAL)
    own = ("data=python", "data.factory=several_numbers:load", f"+data.options.outputs={outputs}")
    tkn.run(compose(*SHORT, *own, "model=tdn10", "recipe.batch_size=8"), tmp_path / "run")
    main(["run", *QUICK, "--trust"])
    notes = json.loads((tmp_path / "run" / "export.json").read_text())["notes"]
    told = any("a class or one number, and python has 2 numbers" in note for note in notes)
    assert told is (outputs == 2)
    plan = tkn.load_plan(tmp_path / "run" / "model.plan")
    assert (plan.preprocessing is None) is told


OWN = """
from torch import nn

def make(input_size, num_outputs):
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, num_outputs))
"""


def test_a_factory_runs_only_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_network_to_export.py").write_text(OWN)
    own = ("model=python", "model.factory=own_network_to_export:make", "model.targeted=true")
    tkn.run(compose(*TINY, *own), tmp_path / "run")
    capsys.readouterr()
    del sys.modules["own_network_to_export"]
    line = refusal(tmp_path / "run", capsys)
    assert "needs own_network_to_export:make, code that would be imported and run: read it, then give --trust" in line
    assert "own_network_to_export" not in sys.modules
    config = tmp_path / "run" / "config.yaml"
    shutil.copytree(tmp_path / "run", tmp_path / "hostile")
    hostile = config.read_text().replace("own_network_to_export:make", '"own:make\\e[2K\\rIt is safe"')
    (tmp_path / "hostile" / "config.yaml").write_text(hostile)
    line = refusal(tmp_path / "hostile", capsys)
    assert r"needs code named 'own:make\x1b[2K\rIt is safe', which is no package.module:function" in line
    main([str(tmp_path / "run"), *QUICK, "--trust"])
    content = json.loads((tmp_path / "run" / "export.json").read_text())
    assert content["plans"][0]["other_classes"] == 0
    assert {row["network"] for row in content["timings"]} == {"dense", "targeted", "plan"}


def test_runs_that_cannot_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(tmp_path / "nowhere", capsys).endswith("nowhere does not exist")
    assert refusal(run / "summary.json", capsys).endswith("is not a run's folder")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty", capsys).endswith("empty holds no run of tkn-run")

    change(run / "summary.json", error=1.0)
    assert re.search(r"best\.ckpt has error .* but summary\.json says 1\.000: other data, or", refusal(run, capsys))
    change(run / "summary.json", test_images=999)
    assert re.search(r"the test images of embedded.* are 1000, of the run 999; tell where", refusal(run, capsys))
    change(run / "summary.json", macs_roi=11_317_030)
    assert re.search(r"best\.ckpt is of another run: macs_roi is .*, in summary\.json 11,317,030", refusal(run, capsys))
    change(run / "summary.json", mode="test")
    assert refusal(run, capsys).endswith("only tests a checkpoint: export the run that trained it")
    change(run / "summary.json", mode="train")
    (run / "best.ckpt").write_bytes((run / "best.ckpt").read_bytes()[:1000])
    assert "best.ckpt is damaged or not a checkpoint" in refusal(run, capsys)
    (run / "best.ckpt").unlink()
    assert refusal(run, capsys).endswith("has no best.ckpt: there is no network to export")
    (run / "summary.json").unlink()
    assert "holds a run that is unfinished: 1 of 1 epochs done" in refusal(run, capsys)


def test_data_that_are_not_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("no images in here")

    monkeypatch.setattr(build, "load_data", missing)
    line = refusal(run, capsys, "--data-dir", str(tmp_path))
    assert line == (
        "the plan can't be checked: no images in here; tell where the data are by --data-dir, "
        "or export without them by --unchecked"
    )


def test_a_plan_that_differs_is_not_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = build.load_plan

    def off(*arguments: Any, **options: Any) -> nn.Module:
        plan = load(*arguments, **options)

        class Off(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return plan(x) * 1.01

        return Off()

    monkeypatch.setattr(build, "load_plan", off)
    line = refusal(run, capsys)
    assert re.search(r"the plan for batches of 3 differs from its network by 1\.0e-02 .* nothing is written", line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "2000"], "--images 2000: mnist has 1,000 test images"),
        (["--output", "no/folder/net.plan"], "No such file or directory"),
    ],
)
def test_wrong_options(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    assert message in refusal(run, capsys, *arguments)


@pytest.mark.parametrize(
    "arguments", [["--batch", "0"], ["--seconds", "-1"], ["--dtype", "float16"], ["--images", "x"]]
)
def test_wrong_values(arguments: list[str], run: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(run), *arguments])
    assert stopped.value.code == 2


def test_intervals() -> None:
    # Wilson's interval of 5 of 100, and of none.
    wrong = torch.zeros(100, dtype=torch.bool)
    none = of_share(wrong)
    wrong[:5] = True
    five = of_share(wrong)
    assert (five.value, five.low, five.high) == pytest.approx((5.0, 2.154, 11.175), abs=1e-3)
    assert (none.value, none.low, none.high) == pytest.approx((0.0, 0.0, 3.699), abs=1e-3)
    for count in (10, 13, 34, 5327):  # where rounding would leave the share itself out
        for share in (0, 1):
            estimate = of_share(torch.full((count,), bool(share)))
            assert estimate.low <= 100 * share <= estimate.high
    mean = of_mean(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    half = 1.959964 * 1.2909944 / 2
    assert (mean.value, mean.low, mean.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-5)
