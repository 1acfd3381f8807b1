"""tkn-bench on the network of a finished run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import tkn
from tkn.bench import measure
from tkn.bench.cli import compose
from tkn.bench.run import bench
from tkn.cli import compose as compose_run
from tkn.layers import roi_layers

TINY = ("data=mnist", "data.source=embedded", "data.limit=64", "recipe.batch_size=32", "trainer.limit_val_batches=1")
TINY = (*TINY, "trainer.limit_test_batches=1", "trainer.accelerator=cpu", "trainer.max_epochs=1", "engine=dense")
QUICK = ("measure.repeats=2", "measure.rounds=1", "measure.seconds=0", "measure.warmup=0", "threads=1")
CASE = ("case=run", "engines=[torch,torch-masked,tkn]", "batch_sizes=[2]", "train_batch_sizes=[2]", *QUICK)

OWN = """
from torch import nn

def make(num_outputs):
    layers = nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, num_outputs))
"""


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_quiet", lambda: None)


def test_ones_own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_network_to_time.py").write_text(OWN)
    own = ("model=python", "model.factory=own_network_to_time:make", "model.targeted=true", "penalty.l2=30")
    summary, _ = tkn.run(compose_run(*TINY, *own), tmp_path / "run")
    del sys.modules["own_network_to_time"]
    with pytest.raises(ValueError, match=r"case\.path=run/last\.ckpt: the network is made by own_network_to_time:make"):
        bench(compose(*CASE, "case.path=run"), tmp_path / "bench")
    assert not (tmp_path / "bench").exists()
    assert "own_network_to_time" not in sys.modules

    result = bench(compose(*CASE, "case.path=run", "case.factory=own_network_to_time:make"), tmp_path / "bench")
    assert json.loads((tmp_path / "bench" / "bench.json").read_text()) == result
    assert (result["case"], result["input_size"]) == ("python_mnist", [1, 28, 28])
    networks = {network["kind"]: network for network in result["networks"]}
    assert networks.keys() == {"baseline", "thinned", "targeted"}
    assert networks["baseline"]["macs"] == summary["macs_dense"]
    assert networks["targeted"]["macs"] == summary["macs_roi"]
    assert networks["targeted"]["rois"] == "run/last.ckpt"
    assert networks["thinned"]["macs"] == pytest.approx(summary["macs_roi"], rel=0.25)
    timed = {(row["network"], row["engine"], row["task"]) for row in result["timings"] if "seconds" in row}
    assert timed == {
        (network, engine, task)
        for network, engine in (
            *(("baseline", "torch"), ("thinned", "torch")),
            *(("targeted", "torch-masked"), ("targeted", "tkn")),
        )
        for task in ("inference", "training")
    }
    assert roi_layers(tkn.load_model("run/last.ckpt", factory="own_network_to_time:make"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("case.path=nowhere", r"case\.path=nowhere is not a file"),
        ("case.path=.", r"case\.path=\. holds no finished run"),
        ("case.path=. case.targeted=tdn10", r"case\.baseline=run must be run, as case\.targeted"),
        ("case.path=. rois.source=generated", r"rois\.source=generated must be checkpoint with case=run"),
        ("case.name=run", r"case\.path"),
        ("case=tdn10_mnist +case.path=run", r"case\.path=run must be null but with case=run"),
    ],
)
def test_what_is_no_run(override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        bench(compose("case=run", *override.split()), tmp_path / "bench")
    assert not (tmp_path / "bench").exists()
