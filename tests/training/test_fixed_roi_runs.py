"""Runs with another run's ROIs, which do not learn, from configuration to files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import TINY, assert_same_run, recorded_rois

import tkn
from tkn.cli import compose, main
from tkn.layers import roi_layers
from tkn.training import run
from tkn.training.module import TargetedTraining

pytestmark = pytest.mark.usefixtures("empty_pictures")
RUN = (*TINY, "model=tdn10", "trainer.max_epochs=1")
FIXED = (*RUN, "penalty=none", "seed=5")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that learned its ROIs."""
    folder = tmp_path_factory.mktemp("learned")
    tkn.run(compose(*RUN, "penalty=budget", "penalty.share=0.35"), folder)
    return folder


@pytest.fixture
def source(learned: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoint, which a test may remove."""
    return Path(shutil.copy(learned / "last.ckpt", tmp_path / "learned.ckpt"))


@pytest.mark.parametrize(
    ("places", "more"),
    [("learned", ("recipe.ema_decay=0.5",)), ("centred", ("engine=roi",)), ("random", ())],
)
def test_rois_stay_and_weights_learn(
    learned: Path, source: Path, tmp_path: Path, places: str, more: tuple[str, ...]
) -> None:
    arguments = (f"rois.checkpoint={source}", f"rois.places={places}")
    summary, objects = tkn.run(compose(*FIXED, *arguments, *more), tmp_path / "fixed")
    theirs = torch.load(source, weights_only=True)["state_dict"]
    model = objects["module"].model
    for name, layer in roi_layers(model).items():
        same = torch.equal(layer.loc.detach(), theirs[f"model.{name}.loc"])
        assert same == (places == "learned"), name
        assert not layer.loc.requires_grad
        assert not torch.equal(layer.weight.detach(), theirs[f"model.{name}.weight"])
    # From before the first step to the end.
    for name, array in recorded_rois(tmp_path / "fixed").items():
        if not name.endswith(".size"):
            assert name == "epochs" or np.array_equal(array[0], array[1]), name
    counted = tkn.count_macs(tkn.load_model(learned / "last.ckpt"), (1, 28, 28)).total_roi
    assert summary["macs_roi"] == counted
    assert summary["rois"] == {
        **{"places": places, "checkpoint": str(source), "data": "mnist", "epochs": 1},
        "penalty": {"share": 0.35, "macs": None, "reach": 0.5, "asked": 3_960_960},
    }
    # Weights alone are the optimiser's.
    assert len(objects["module"].optimizers().param_groups) == 1
    source.unlink()
    testing = (*RUN, *more, "mode=test", f"checkpoint={tmp_path / 'fixed' / 'last.ckpt'}")
    tested, _ = tkn.run(compose(*testing), tmp_path / "tested")
    for key in ("error", "macs_roi", "rois"):
        assert tested[key] == summary[key], key


def test_an_interrupted_run_goes_on_without_the_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*FIXED, "trainer.max_epochs=2", f"rois.checkpoint={source}", "rois.places=random")
    _, objects = tkn.run(compose(*arguments), tmp_path / "whole")
    assert objects["module"].architecture.targeted
    step = TargetedTraining.training_step

    def power_cut(self: TargetedTraining, batch: Any, batch_index: int) -> Any:
        if self.current_epoch == 1:
            raise RuntimeError("power cut")
        return step(self, batch, batch_index)

    monkeypatch.setattr(TargetedTraining, "training_step", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        tkn.run(compose(*arguments), tmp_path / "broken")
    monkeypatch.setattr(TargetedTraining, "training_step", step)
    source.unlink()
    _, objects = tkn.run(compose(*arguments), tmp_path / "broken")
    assert not any(layer.scale.requires_grad for layer in roi_layers(objects["module"].model).values())
    assert_same_run(tmp_path / "broken", tmp_path / "whole")

    checkpoint = f"checkpoint={tmp_path / 'whole' / 'last.ckpt'}"
    longer = (*arguments, "trainer.max_epochs=3", checkpoint)
    for other in ("rois.places=centred", "rois.checkpoint=elsewhere.ckpt"):
        with pytest.raises(ValueError, match=rf"is of {other.partition('=')[0]}=.*, but this run is of {other}"):
            tkn.run(compose(*longer, other), tmp_path / "changed")
    with pytest.raises(ValueError, match=r"is of rois\.checkpoint=.*, but this run is of rois\.checkpoint=None"):
        tkn.run(compose(*RUN, "penalty=none", "seed=5", checkpoint), tmp_path / "learning")
    again = (*FIXED, f"rois.checkpoint={tmp_path / 'whole' / 'last.ckpt'}")
    with pytest.raises(ValueError, match=r"whole/last\.ckpt is of ROIs that did not learn: name the run that learned"):
        tkn.run(compose(*again), tmp_path / "twice")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rois.checkpoint=none.ckpt",), r"rois\.checkpoint=none\.ckpt is not a file"),
        (("model=tdn40",), r"rois\.checkpoint=.* is of model=tdn10, but this run is of model=tdn40"),
        (("attention=gaussian",), r"is of attention\.name=cauchy, but this run is of attention\.name=gaussian"),
        (("attention.min_size=5",), r"is of attention\.min_size=3, but this run is of attention\.min_size=5"),
        (("model.layers=all",), r"is of model\.layers=None, but this run is of model\.layers=all"),
    ],
)
def test_another_networks_rois_are_refused_before_the_data_are_loaded(
    learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(run, "load_data", None)
    with pytest.raises((ValueError, OSError), match=message):
        tkn.run(compose(*FIXED, f"rois.checkpoint={learned / 'last.ckpt'}", *arguments), tmp_path)


def test_what_only_the_data_show(learned: Path, tmp_path: Path) -> None:
    rois = f"rois.checkpoint={learned / 'last.ckpt'}"
    larger = ("data=tlmnist", "data.source=embedded", "data.limit=96")
    with pytest.raises(ValueError, match=r"rois\.checkpoint=.* is of input_size=\[1, 28, 28\], but this run is of"):
        tkn.run(compose(*FIXED, rois, *larger), tmp_path / "larger")
    weights = f"model.weights={learned / 'last.ckpt'}"
    with pytest.raises(ValueError, match=r"rois\.checkpoint=.* and model\.weights=.* both bring loc and scale"):
        tkn.run(compose(*FIXED, rois, weights), tmp_path / "both")


def test_a_wrong_place_is_one_line(wrong_arguments: Any) -> None:
    line = wrong_arguments(main, "rois.checkpoint=last.ckpt", "rois.places=centered")
    assert line == "tkn-run: error: unknown rois.places 'centered'; did you mean 'centred'?"
