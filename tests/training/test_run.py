"""Runs, from configuration to files, on a few embedded digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import TINY, metrics_rows, recorded_rois

import tkn
from tkn.app.processor import processor_name
from tkn.app.versions import project_commit
from tkn.backends.cpu import normed
from tkn.backends.cpu.build import kernels
from tkn.cli import compose
from tkn.layers import roi_layers
from tkn.training.module import Diverged, TargetedTraining


def _weights(objects: dict[str, Any]) -> dict[str, torch.Tensor]:
    return objects["module"].model.state_dict()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_densenet_has_maps_that_its_layers_are_joined_on(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = bool(kernels(torch.float32).tkn_bfloat16())  # else the modules compute
    calls: list[tuple[int, ...]] = []
    forward = normed.forward
    monkeypatch.setattr(normed, "forward", lambda x, *rest: (calls.append(tuple(x.shape)), forward(x, *rest))[1])
    faces = ("data=pain_synthetic", "data.subjects=3", "data.frames=8", "data.test_subjects=1", "data.limit=32")
    config = compose(
        *(*(TINY[:3] if channels == 1 else faces), *TINY[3:], "model=tdn10", "engine=roi"),
        *("trainer.precision=bf16-mixed", "trainer.max_epochs=1", "trainer.limit_train_batches=1"),
    )
    _, objects = tkn.run(config, tmp_path)
    assert len(calls) == 6 * joined
    assert objects["module"].model[0].weight.is_contiguous()


def test_a_run_leaves_what_it_promises(tmp_path: Path) -> None:
    config = compose(*TINY, "model=tdn10", "trainer.max_epochs=2", "penalty.l2=0.5", "seed=5")
    metrics, objects = tkn.run(config, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("summary.json", "metrics.csv", "last.ckpt", "best.ckpt"),
        *("attention_maps.png", "curves.png", "config.yaml", "rois.npz"),
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == metrics
    assert {"model": "tdn10", "data": "mnist", "experiment": None, "seed": 5, "epochs": 2}.items() <= summary.items()
    assert summary["parameters"] == 45_034
    assert summary["macs_dense"] == 11_317_030
    assert summary["data_source"].startswith("partial: data.limit=96, trainer.limit_val_batches=2, ")
    assert (summary["train_images"], summary["test_images"]) == (96, 1000)
    assert summary["wall_seconds"] >= summary["train_seconds"] > 0
    assert summary["processor"] == processor_name()
    assert summary["commit"] == project_commit()
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    assert 0 <= summary["error"] <= 100
    # The penalty is strong: ROIs have shrunk, and the summary counts them.
    layers = summary["target_layers"]
    assert [layer["name"] for layer in layers] == list(roi_layers(objects["module"].model))
    assert summary["macs_roi"] < summary["macs_dense"]
    saved = sum(layer["macs_dense"] - layer["macs_roi"] for layer in layers)
    assert summary["macs_dense"] - summary["macs_roi"] == saved
    assert [tuple(layer["map_size"]) for layer in layers] == [(28, 28)] * 2 + [(14, 14)] * 2 + [(7, 7)] * 2
    recorded = recorded_rois(tmp_path)
    assert list(recorded["epochs"]) == [0, 1, 2]
    for name, layer in roi_layers(objects["module"].model).items():
        assert (recorded[f"{name}.loc"][0] == 0.5).all()
        assert (recorded[f"{name}.scale"][0] == 1).all()
        assert np.array_equal(recorded[f"{name}.scale"][2], layer.scale.detach().numpy())
        assert recorded[f"{name}.loc"].shape == (3, *layer.loc.shape)
        assert tuple(recorded[f"{name}.size"]) == objects["module"].map_sizes[name]
    rows = metrics_rows(tmp_path)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.1, 0.01])
    assert int(rows[-1]["macs_roi"]) == summary["macs_roi"]
    assert float(rows[-1]["test/error"]) == summary["error"]
    assert {"train/loss", "train/error", "test/loss"} <= rows[0].keys()


def test_the_same_seed_repeats_to_the_bit(tmp_path: Path) -> None:
    config = compose(*TINY, "model=tdn10", "model.dropout=0.2", "trainer.max_epochs=1")
    _, first = tkn.run(config, tmp_path / "first")
    _, second = tkn.run(config, tmp_path / "second")
    _, other = tkn.run(compose(*TINY, "model=tdn10", "trainer.max_epochs=1", "seed=1"), tmp_path / "other")
    for name, weight in _weights(first).items():
        assert torch.equal(weight, _weights(second)[name]), name
    assert metrics_rows(tmp_path / "first") == metrics_rows(tmp_path / "second")
    assert not torch.equal(_weights(first)["fc.weight"], _weights(other)["fc.weight"])


@pytest.mark.parametrize("in_place", [True, False])
def test_an_interrupted_run_continues_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    arguments = (*TINY, "model=tdn10", "model.dropout=0.2", "trainer.max_epochs=3", "penalty.l2=0.01")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    summary, objects = tkn.run(compose(*arguments), whole)

    step = TargetedTraining.training_step

    def power_cut(self: TargetedTraining, batch: Any, batch_index: int) -> torch.Tensor:
        if self.current_epoch == 1 and batch_index == 1:
            raise RuntimeError("power cut")
        return step(self, batch, batch_index)

    monkeypatch.setattr(TargetedTraining, "training_step", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        tkn.run(compose(*arguments), broken)
    monkeypatch.setattr(TargetedTraining, "training_step", step)
    assert not (broken / "summary.json").exists()

    continued = broken if in_place else tmp_path / "continued"
    resumed, resumed_objects = tkn.run(compose(*arguments, f"checkpoint={broken / 'last.ckpt'}"), continued)
    for name, weight in _weights(objects).items():
        assert torch.equal(weight, _weights(resumed_objects)[name]), name
    assert metrics_rows(continued) == metrics_rows(whole)
    for name, array in recorded_rois(whole).items():
        assert np.array_equal(array, recorded_rois(continued)[name]), name
    for key in ("error", "best_error", "best_epoch", "macs_roi", "epochs", "target_layers"):
        assert resumed[key] == summary[key], key
    assert {"last.ckpt", "best.ckpt"} <= {path.name for path in continued.iterdir()}


def test_mode_test_gives_the_trained_error(tmp_path: Path) -> None:
    trained, _ = tkn.run(compose(*TINY, "model=tdn10", "trainer.max_epochs=1", "penalty.l2=1"), tmp_path / "train")
    checkpoint = f"checkpoint={tmp_path / 'train' / 'last.ckpt'}"
    tested, _ = tkn.run(
        compose(*TINY, "model=tdn10", "mode=test", "seed=9", "penalty.l2=7", checkpoint), tmp_path / "test"
    )
    assert (tested["mode"], tested["tested"], tested["epochs"]) == ("test", "checkpoint", 0)
    # The penalty and the seed are those of the training.
    for key in ("error", "macs_roi", "parameters", "target_layers", "penalty", "seed"):
        assert tested[key] == trained[key], key
    assert (tmp_path / "test" / "attention_maps.png").exists()


def test_held_out_images_choose_the_tested_model(tmp_path: Path) -> None:
    config = compose(*TINY, "model=dn10", "trainer.max_epochs=2", "data.validation=32")
    summary, objects = tkn.run(config, tmp_path)
    assert (summary["tested"], summary["best_chosen_on"]) == ("best", "valid")
    assert {"valid/error"} <= metrics_rows(tmp_path)[0].keys()
    assert min(float(row["valid/error"]) for row in metrics_rows(tmp_path)) == summary["best_error"]
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    for name, weight in _weights(objects).items():
        assert torch.equal(weight, best[f"model.{name}"]), name
    assert not (tmp_path / "attention_maps.png").exists()  # no target layer, no map


def test_soft_training_reports_the_clipped_error_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = compose(*TINY, "model=tdn10", "trainer.max_epochs=1", "attention.clip=false", "penalty.l2=0.1")
    summary, objects = tkn.run(config, tmp_path)
    assert "measured without clipping" in caplog.text
    assert 0 <= summary["error_clipped"] <= 100
    assert {"test/error", "test/error_clipped"} <= metrics_rows(tmp_path)[0].keys()
    assert not any(layer.clip for layer in roi_layers(objects["module"].model).values())


def test_cnn6_learns_at_the_papers_rate(tmp_path: Path) -> None:
    # Without clipping its loss is infinite within ten steps.
    summary, objects = tkn.run(compose(*TINY, "data.limit=512", "model=tkn6", "trainer.max_epochs=1"), tmp_path)
    assert objects["trainer"].gradient_clip_val == 1
    assert summary["error"] < 70  # chance is 90


def test_mixed_precision(tmp_path: Path) -> None:
    summary, objects = tkn.run(
        compose(*TINY, "model=tdn10", "trainer.max_epochs=1", "trainer.precision=bf16-mixed"), tmp_path
    )
    assert summary["precision"] == "bf16-mixed"
    assert all(weight.dtype == torch.float32 for weight in objects["module"].model.parameters())
    assert 0 <= summary["error"] <= 100


def test_the_average_is_what_is_tested_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw: list[torch.Tensor] = []
    optimizer_step = TargetedTraining.optimizer_step

    def recorded(self: TargetedTraining, *args: Any, **kwargs: Any) -> None:
        if not raw:
            raw.append(self.learning.fc.weight.detach().clone())
        previous = self.model.fc.weight.detach().clone()
        optimizer_step(self, *args, **kwargs)
        raw.append(self.learning.fc.weight.detach().clone())
        step = len(raw) - 1
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * previous + (1 - decay) * raw[-1]
        torch.testing.assert_close(self.model.fc.weight.detach(), expected, rtol=1e-6, atol=1e-8)

    monkeypatch.setattr(TargetedTraining, "optimizer_step", recorded)
    arguments = (*TINY, "model=tdn10", "trainer.max_epochs=2", "penalty.l2=0.5", "recipe.ema_decay=0.25")
    summary, objects = tkn.run(compose(*arguments), tmp_path / "averaged")
    assert len(raw) == 1 + 6
    model = objects["module"].model
    assert all(parameter.requires_grad for parameter in model.parameters())
    saved = torch.load(tmp_path / "averaged" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["model.fc.weight"], model.fc.weight)
    assert torch.equal(saved["raw.fc.weight"], raw[-1])
    again = compose(*arguments, "mode=test", f"checkpoint={tmp_path}/averaged/last.ckpt")
    tested, _ = tkn.run(again, tmp_path / "tested")
    assert (tested["error"], tested["macs_roi"]) == (summary["error"], summary["macs_roi"])


def test_the_penalty_acts_in_its_part_of_the_run(tmp_path: Path) -> None:
    arguments = (*TINY, "model=tdn10", "trainer.max_epochs=2", "penalty.l2=0.5", "recipe.optimizer.momentum=0")
    arguments = (*arguments, "recipe.optimizer.nesterov=false", "recipe.lr_drops=[]")
    tkn.run(compose(*arguments, "penalty.end=0.5"), tmp_path / "first")
    tkn.run(compose(*arguments, "penalty.start=0.5"), tmp_path / "second")
    for folder, (first, second) in {"first": (True, False), "second": (False, True)}.items():
        recorded = recorded_rois(tmp_path / folder)
        scales = [
            sum(recorded[name][epoch].sum() for name in recorded if name.endswith(".scale")) for epoch in range(3)
        ]
        # With l2 = 0.5 a scale of 1 loses a tenth at every step; without it next to nothing changes.
        assert (scales[1] < 0.9 * scales[0], scales[2] < 0.9 * scales[1]) == (first, second)


def test_label_smoothing_is_in_what_is_minimised_and_not_in_what_is_logged(tmp_path: Path) -> None:
    rows = {}
    for lr in (0, 0.1):
        for smoothing in (0, 0.5):
            arguments = (*TINY, "model=dn10", f"recipe.optimizer.lr={lr}", f"recipe.label_smoothing={smoothing}")
            tkn.run(compose(*arguments, "trainer.max_epochs=1"), tmp_path / f"{lr} {smoothing}")
            rows[lr, smoothing] = metrics_rows(tmp_path / f"{lr} {smoothing}")
    assert rows[0, 0] == rows[0, 0.5]
    assert rows[0.1, 0] != rows[0.1, 0.5]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "roi"])
def test_a_compiled_run_learns_the_same(engine: str, tmp_path: Path) -> None:
    # A small rate: rounding grows from step to step. Dropout, for its random numbers must be the same too.
    tiny = (
        *(*TINY, "model=tdn10", "model.dropout=0.1", "trainer.max_epochs=1", "data.limit=64"),
        "recipe.optimizer.lr=1e-3",
    )
    summary, objects = tkn.run(compose(*tiny, "trainer.compile=true", f"engine={engine}"), tmp_path / "compiled")
    expected, expected_objects = tkn.run(compose(*tiny), tmp_path / "eager")
    assert summary["compiled"]
    assert not expected["compiled"]
    model, reference = objects["module"].model, expected_objects["module"].model
    assert model._compiled_call_impl is not None
    assert list(model.state_dict()) == list(reference.state_dict())
    torch.testing.assert_close(dict(model.named_parameters()), dict(reference.named_parameters()), rtol=1e-4, atol=1e-5)
    assert summary["macs_roi"] == expected["macs_roi"]


def test_regression(tmp_path: Path) -> None:
    config = compose(
        *("model=tdn40", "data=pain_synthetic", "data.subjects=3", "data.sequences=1", "data.frames=4"),
        *("data.test_subjects=1", "recipe.batch_size=4", "trainer.max_epochs=1", f"data_dir={tmp_path / 'datasets'}"),
        "trainer.accelerator=cpu",
    )
    summary, _ = tkn.run(config, tmp_path / "run")
    assert summary["mae"] >= 0
    assert summary["mse"] >= summary["mae"] ** 2  # Jensen
    assert summary["parameters"] == 828_901 + 18 * 36 * 4
    assert "error" not in summary
    assert summary["data_source"].startswith("synthetic")


@pytest.mark.parametrize("min_size", [2, 8])
def test_rois_stay_valid_through_training(tmp_path: Path, min_size: int) -> None:
    config = compose(*TINY, "model=tdn10", "trainer.max_epochs=2", "penalty.l2=1", f"attention.min_size={min_size}")
    _, objects = tkn.run(config, tmp_path)
    module = objects["module"]
    for name, layer in roi_layers(module.model).items():
        rois = layer.rois(module.map_sizes[name])
        assert (rois[..., 1] - rois[..., 0]).min() >= min(min_size, *module.map_sizes[name])  # the last have 7 pixels


def test_a_diverging_loss_stops_the_run(tmp_path: Path) -> None:
    config = compose(*TINY, "model=dn10", "trainer.max_epochs=3", "recipe.optimizer.lr=1e30")
    with pytest.raises(Diverged, match=r"training loss became (nan|inf) in epoch 1: lower recipe\.optimizer\.lr"):
        tkn.run(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    assert not (tmp_path / "last.ckpt").exists()


def test_a_loss_that_no_step_looked_at_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require = TargetedTraining._require_finite

    def at_the_end_only(self: TargetedTraining, loss: torch.Tensor) -> None:
        if self.trainer.global_step >= 2:  # as on a GPU, which is not asked at every step
            require(self, loss)

    monkeypatch.setattr(TargetedTraining, "_require_finite", at_the_end_only)
    config = compose(*TINY, "model=dn10", "trainer.max_epochs=1", "recipe.optimizer.lr=1e30")
    with pytest.raises(Diverged, match=r"training loss became (nan|inf) in epoch 1"):
        tkn.run(config, tmp_path)
    assert not (tmp_path / "last.ckpt").exists()


def test_a_new_run_removes_the_summary_of_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(FileNotFoundError):
        tkn.run(compose("data=pain", f"data_dir={tmp_path}"), tmp_path)
    assert not (tmp_path / "summary.json").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last.ckpt of a tdn10 with Cauchy attention."""
    folder = tmp_path_factory.mktemp("run")
    tkn.run(compose(*TINY, "model=tdn10", "trainer.max_epochs=1"), folder)
    return folder / "last.ckpt"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=dn10",), "is of model=tdn10, but this run is of model=dn10"),
        (
            ("model=tdn10", "attention=gaussian"),
            r"is of attention\.name=cauchy, but this run is of attention\.name=gaussian",
        ),
        (
            ("model=tdn10", "data=tlmnist"),
            r"is of input_size=\[1, 28, 28\], but this run is of input_size=\[1, 56, 56\]",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["train", "test"])
def test_checkpoints_of_other_models(
    tmp_path: Path, checkpoint: Path, overrides: tuple[str, ...], message: str, mode: str
) -> None:
    config = compose(*TINY, *overrides, f"mode={mode}", f"checkpoint={checkpoint}")
    with pytest.raises(ValueError, match=message):
        tkn.run(config, tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "is of seed=0, but this run is of seed=1"),
        ("data.validation=16", r"is of data\.validation=0, but this run is of data\.validation=16"),
        ("attention.clip=false", r"is of attention\.clip=True, but this run is of attention\.clip=False"),
    ],
)
def test_another_run_cannot_be_continued(tmp_path: Path, checkpoint: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tkn.run(compose(*TINY, "model=tdn10", override, f"checkpoint={checkpoint}"), tmp_path)


def test_a_finished_run_can_be_continued_elsewhere(
    tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = (*TINY, "model=tdn10", "trainer.max_epochs=1", "penalty.l2=0.5", f"checkpoint={checkpoint}")
    summary, _ = tkn.run(compose(*arguments), tmp_path)
    assert summary["epochs"] == 1
    assert {"last.ckpt", "best.ckpt", "metrics.csv"} <= {path.name for path in tmp_path.iterdir()}
    assert "was trained with penalty.l2=0.0001, and goes on with 0.5" in caplog.text


@pytest.mark.parametrize(
    "override", ["recipe.optimizer.lr=0.01", "recipe.attention_lr_factor=0.1", "recipe.ema_decay=0.9"]
)
def test_an_optimiser_goes_on_as_it_was(tmp_path: Path, checkpoint: Path, override: str) -> None:
    key, value = override.split("=")
    config = compose(*TINY, "model=tdn10", "trainer.max_epochs=2", override, f"checkpoint={checkpoint}")
    with pytest.raises(ValueError, match=rf"is of {key}=\S+, but this run is of {key}={value}$"):
        tkn.run(config, tmp_path)


def test_a_checkpoint_of_another_version_is_only_tested(tmp_path: Path, checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    del content["tkn"]["config"]["recipe"]["ema_decay"]
    old = tmp_path / "last.ckpt"
    torch.save(content, old)
    arguments = (*TINY, "model=tdn10", "trainer.max_epochs=2", f"checkpoint={old}")
    with pytest.raises(ValueError, match="it can be tested, but not continued"):
        tkn.run(compose(*arguments), tmp_path / "continued")
    tested, _ = tkn.run(compose(*arguments, "mode=test"), tmp_path / "tested")
    assert 0 <= tested["error"] <= 100


def test_a_run_without_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"limit_train_batches=1\.0 of 0 batches leaves none"):
        tkn.run(compose(*TINY, "data.limit=1", "model=dn10", "trainer.max_epochs=1"), tmp_path)


def test_continuing_needs_the_best_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    alone = tmp_path / "last.ckpt"
    alone.write_bytes(checkpoint.read_bytes())
    config = compose(*TINY, "model=tdn10", "trainer.max_epochs=2", f"checkpoint={alone}")
    with pytest.raises(FileNotFoundError, match=r"best\.ckpt beside it"):
        tkn.run(config, tmp_path / "run")


def test_lightning_refuses_before_the_data_are_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^trainer: "):
        tkn.run(compose("data=pain", "trainer.accelerator=gpuu"), tmp_path)


def test_damaged_and_foreign_checkpoints(tmp_path: Path, checkpoint: Path) -> None:
    truncated, foreign, empty = (tmp_path / f"{name}.ckpt" for name in ("truncated", "foreign", "empty"))
    empty.touch()
    truncated.write_bytes(checkpoint.read_bytes()[:2000])
    torch.save({"state_dict": {}}, foreign)
    for path, error, message in (
        (truncated, ValueError, "truncated.ckpt is damaged or not a checkpoint"),
        (empty, ValueError, "empty.ckpt is damaged or not a checkpoint: "),
        (foreign, ValueError, "foreign.ckpt was not written by tkn-run"),
        (tmp_path / "absent.ckpt", FileNotFoundError, "absent.ckpt is not a file"),
    ):
        config = compose(*TINY, "model=tdn10", "mode=test", f"checkpoint={path}")
        with pytest.raises(error, match=message):
            tkn.run(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.limit=4001",), r"data\.limit=4001 must be 1 to 4,000"),
        (("data.limit=50", "data.validation=50"), r"data\.validation=50 must be 0 to 49"),
    ],
)
def test_what_only_the_data_tell(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tkn.run(compose(*TINY, *overrides), tmp_path)
