"""What runs log to trackers is what metrics.csv says, and logging changes no run."""

from __future__ import annotations

import csv
import io
import json
import random
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pytorch_lightning.loggers import Logger

import tkn
from tkn.cli import compose
from tkn.training.config import check_config
from tkn.training.loggers.config import LOGGER_CONFIGS, TensorBoardConfig
from tkn.training.loggers.log import RunLog
from tkn.training.loggers.trackers import LOGS
from tkn.training.module import TargetedTraining

TINY = ("model=tdn10", "model.dropout=0.2", "data=mnist", "data.source=embedded", "data.limit=64")
TINY = (*TINY, "recipe.batch_size=32", "penalty.l2=0.5", "trainer.accelerator=cpu")
TINY = (*TINY, "trainer.limit_val_batches=2", "trainer.limit_test_batches=2")


@dataclass
class Logged:
    """What a tracker holds of one run: scalars[name][step], the steps' images (decoded), the configuration."""

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    images: dict[int, Image.Image] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, step: int, value: float) -> None:
        assert step not in self.scalars.get(name, {}), f"{name} logged twice at step {step}"
        self.scalars.setdefault(name, {})[step] = value


def _rows(folder: Path) -> dict[str, dict[int, float]]:
    """metrics.csv in the shape of Logged.scalars."""
    logged = Logged()
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "epoch":
                    logged.add(name, int(row["epoch"]), float(value))
    return logged.scalars


def _numbers(folder: Path) -> dict[str, float]:
    summary = json.loads((folder / "summary.json").read_text())
    return {f"summary/{key}": value for key, value in summary.items() if type(value) in (int, float)}


def _assert_logged(logged: Logged, folder: Path, epochs: int, images: set[int]) -> None:
    """`logged` holds metrics.csv, the summary's numbers, images at these epochs, and nothing else."""
    rows = _rows(folder)
    assert {"lr", "train/loss", "train/error", "test/loss", "test/error", "macs_roi", "step_seconds"} <= rows.keys()
    numbers = _numbers(folder)
    assert {f"summary/{name}" for name in ("error", "macs_roi", "macs_dense", "parameters")} <= numbers.keys()
    expected = {**rows, **{name: {epochs: value} for name, value in numbers.items()}}
    assert logged.scalars.keys() == expected.keys()
    for name, values in expected.items():
        assert logged.scalars[name] == pytest.approx(values, rel=1e-6), name  # TensorBoard's are float32
    assert logged.images.keys() == images
    for image in logged.images.values():
        assert image.width > image.height > 500
        assert len(image.getcolors(2**24) or ()) > 50  # windows in gray, boxes in orange


# --- The callback, with a tracker that keeps everything in memory.


class _MemoryLogger(Logger):
    """Draws from every random number generator whenever it is called."""

    name = version = "memory"
    experiment = None

    def __init__(self) -> None:
        super().__init__()
        self.logged = Logged()
        self.statuses: list[str] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        _draw_random_numbers()
        assert step is not None
        for name, value in metrics.items():
            self.logged.add(name, step, value)

    def log_hyperparams(self, params: Any, *_args: Any, **_options: Any) -> None:
        _draw_random_numbers()
        self.logged.config = params

    def finalize(self, status: str) -> None:
        self.statuses.append(status)


def _random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def _draw_random_numbers() -> None:
    random.random()
    np.random.random()  # noqa: NPY002
    torch.rand(3)


class _MemoryLog(RunLog):
    packages = ()
    logger: _MemoryLogger
    opened: list[_MemoryLog]

    def open(self) -> Logger:
        self.opened.append(self)
        return _MemoryLogger()

    def log_image(self, image: Image.Image, epoch: int) -> None:
        _draw_random_numbers()
        assert epoch not in self.logger.logged.images
        self.logger.logged.images[epoch] = image


@pytest.fixture
def memory_logs(monkeypatch: pytest.MonkeyPatch) -> list[_MemoryLog]:
    """The logs of this test's runs, in their order."""
    monkeypatch.setitem(LOGGER_CONFIGS, "memory", TensorBoardConfig)
    monkeypatch.setitem(LOGS, "memory", _MemoryLog)
    monkeypatch.setattr(_MemoryLog, "opened", [], raising=False)
    return _MemoryLog.opened


def _memory_config(*overrides: str, every: int = 5) -> DictConfig:
    config = compose(*TINY, *overrides)
    OmegaConf.set_struct(config, False)
    config.logger = {"name": "memory", "images_every_epochs": every}
    return config


def test_rows_and_images_by_epoch(tmp_path: Path, memory_logs: list[_MemoryLog]) -> None:
    tkn.run(_memory_config("trainer.max_epochs=3"), tmp_path)
    (log,) = memory_logs
    _assert_logged(log.logger.logged, tmp_path, epochs=3, images={1, 3})
    assert log.logger.statuses == ["success"]
    assert log.title == "tdn10 on mnist (partial data)"
    config = log.logger.logged.config
    assert config["penalty"] == {"l2": 0.5, "beta": 2.0, "start": 0.0, "end": 1.0}
    assert "embedded" in config["data_source"]
    assert config["folder"] == str(tmp_path)


def test_a_logger_changes_no_result(tmp_path: Path, memory_logs: list[_MemoryLog]) -> None:
    _, logged = tkn.run(_memory_config("trainer.max_epochs=2", every=1), tmp_path / "logged")
    states = _random_states()
    _, plain = tkn.run(compose(*TINY, "trainer.max_epochs=2"), tmp_path / "plain")
    assert memory_logs[0].logger.logged.images.keys() == {1, 2}
    for name, weight in plain["module"].model.state_dict().items():
        assert torch.equal(weight, logged["module"].model.state_dict()[name]), name
    with_logger, without = _rows(tmp_path / "logged"), _rows(tmp_path / "plain")
    for name in without.keys() - {"seconds", "step_seconds"}:
        assert with_logger[name] == without[name], name
    assert states == _random_states()


def test_a_run_continued_elsewhere_logs_what_was_before(tmp_path: Path, memory_logs: list[_MemoryLog]) -> None:
    tkn.run(_memory_config("trainer.max_epochs=1"), tmp_path / "first")
    checkpoint = f"checkpoint={tmp_path / 'first' / 'last.ckpt'}"
    tkn.run(_memory_config("trainer.max_epochs=2", checkpoint), tmp_path / "second")
    _assert_logged(memory_logs[1].logger.logged, tmp_path / "second", epochs=2, images={2})


def test_a_failed_run_is_closed_as_failed(tmp_path: Path, memory_logs: list[_MemoryLog]) -> None:
    with pytest.raises(ValueError, match="training loss became"):
        tkn.run(_memory_config("trainer.max_epochs=1", "recipe.optimizer.lr=1e30"), tmp_path / "diverged")
    assert memory_logs[0].logger.statuses == ["failed"]
    with pytest.raises(ValueError, match=r"data\.limit=4001"):
        tkn.run(_memory_config("data.limit=4001"), tmp_path / "refused")
    assert memory_logs[1].logger.statuses == ["failed"]


def test_a_tested_checkpoint_is_logged(tmp_path: Path, memory_logs: list[_MemoryLog]) -> None:
    tkn.run(compose(*TINY, "trainer.max_epochs=1"), tmp_path / "train")
    tkn.run(_memory_config("mode=test", f"checkpoint={tmp_path / 'train' / 'last.ckpt'}"), tmp_path / "test")
    logged = memory_logs[0].logger.logged
    assert logged.scalars == {name: {0: value} for name, value in _numbers(tmp_path / "test").items()}
    assert logged.images.keys() == {0}
    assert logged.config["mode"] == "test"


def test_networks_without_target_layers_have_no_images(tmp_path: Path, memory_logs: list[_MemoryLog]) -> None:
    tkn.run(_memory_config("model=dn10", "trainer.max_epochs=1"), tmp_path)
    _assert_logged(memory_logs[0].logger.logged, tmp_path, epochs=1, images=set())


# --- The configuration.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("logger=wandb", "+logger.projet=a"), r"unknown key 'logger\.projet'; did you mean 'logger\.project'"),
        (("logger=mlflow", "+logger.uri=a"), r"unknown key 'logger\.uri'; did you mean 'logger\.tracking_uri'"),
        (("logger=csv", "+logger.offline=true"), r"unknown key 'logger\.offline'; did you mean 'logger\.name'"),
        (("logger=wandb", "logger.offline=maybe"), r"logger\.offline: Value 'maybe'"),
        (("logger=tensorboard", "logger.images_every_epochs=0"), r"logger\.images_every_epochs=0 must be at least 1"),
        (("logger=tensorboard", "logger.images_every_epochs=a"), r"logger\.images_every_epochs: Value 'a'"),
        (("logger.name=wandbb",), r"unknown logger\.name 'wandbb'; did you mean 'wandb'\?"),
        (("logger=mlflow", "~logger.tracking_uri"), r"key 'logger\.tracking_uri' is missing"),
    ],
)
def test_wrong_keys_and_values(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(compose(*overrides))


def test_the_environment_names_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    wandb, mlflow = (check_config(compose(f"logger={name}")).logger for name in ("wandb", "mlflow"))
    assert (wandb.project, wandb.entity, wandb.offline) == ("targeted-kernel-networks", None, False)
    assert (mlflow.experiment_name, mlflow.tracking_uri) == (
        "targeted-kernel-networks",
        "sqlite:///outputs/mlflow/mlflow.db",
    )
    monkeypatch.setenv("WANDB_ENTITY", "us")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert check_config(compose("logger=wandb")).logger.entity == "us"
    assert check_config(compose("logger=mlflow")).logger.tracking_uri == "http://localhost:5000"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_before_the_data_are_loaded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"^logger={name} needs the package {name} \(the extra '{name}'\)$"):
        tkn.run(compose("data=pain", f"data_dir={tmp_path}", f"logger={name}"), tmp_path)


# --- The trackers themselves.

# mlflow's models of its database, which are not ours to change.
_MLFLOW_WARNING = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning:mlflow.store.tracking.sqlalchemy_store"
)

_WANDB_HEADER, _WANDB_BLOCK = 7, 32_768


def _wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format behind a header."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    position, parts = _WANDB_HEADER, b""
    while position + 7 <= len(content):
        if _WANDB_BLOCK - position % _WANDB_BLOCK < 7:  # the rest of a block that is too short for a header
            position += _WANDB_BLOCK - position % _WANDB_BLOCK
            continue
        _checksum, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def _read_wandb(folder: Path) -> list[Logged]:
    """By run id; each continuation of an offline run has a file of its own."""
    import wandb

    wandb.teardown()  # its background process may still be writing
    runs: dict[str, Logged] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        logged = runs.setdefault(path.stem, Logged())
        for record in _wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                assert (record.run.display_name, record.run.project) == (folder.name, "targeted-kernel-networks")
                assert list(record.run.tags) == ["tdn10", "mnist"]
            elif kind == "config":
                logged.config.update({item.key: json.loads(item.value_json) for item in record.config.update})
            elif kind == "history":
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                epoch = items.pop("epoch")
                (image,) = items.get("attention_maps/filenames", [None])
                if image:
                    logged.images[epoch] = Image.open(path.parent / "files" / image).convert("RGB")
                for name, value in items.items():
                    if not name.startswith(("_", "attention_maps/")):
                        logged.add(name, epoch, value)
    return list(runs.values())


def _read_tensorboard(folder: Path) -> list[Logged]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    logged = Logged()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            logged.add(name, event.step, event.value)
    for image in events.Images("attention_maps"):
        assert image.step not in logged.images
        logged.images[image.step] = Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")
    started = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info
    logged.config = {"penalty": {"l2": started.hparams["penalty/l2"].number_value}}
    return [logged]


def _read_mlflow(folder: Path) -> list[Logged]:
    from mlflow import MlflowClient

    client = MlflowClient("sqlite:///outputs/mlflow/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'targeted-kernel-networks'")
    runs = []
    for run in client.search_runs([experiment.experiment_id], f"tags.folder = '{folder}'"):
        assert (run.info.run_name, run.data.tags["data"]) == (folder.name, "mnist")
        logged = Logged(config={"penalty": {"l2": float(run.data.params["penalty/l2"])}})
        for name in run.data.metrics:
            for metric in client.get_metric_history(run.info.run_id, name):
                logged.add(name, metric.step, metric.value)
        for file in client.list_artifacts(run.info.run_id, "images"):
            if file.path.endswith(".png"):
                step = int(file.path.split("+step+")[1].split("+")[0])
                assert step not in logged.images
                copy = client.download_artifacts(run.info.run_id, file.path, str(folder.parent))
                logged.images[step] = Image.open(copy).convert("RGB")
        runs.append(logged)
    return runs


@pytest.fixture(
    params=[
        pytest.param("tensorboard", marks=pytest.mark.slow),
        pytest.param("wandb", marks=pytest.mark.slow),
        pytest.param("mlflow", marks=[pytest.mark.slow, _MLFLOW_WARNING]),
    ]
)
def tracker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return str(request.param)


_READ = {"tensorboard": _read_tensorboard, "wandb": _read_wandb, "mlflow": _read_mlflow}


def test_a_tracker_holds_the_run(tracker: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = compose(*TINY, "trainer.max_epochs=2", f"logger={tracker}")
    folder = tmp_path / "run"
    tkn.run(config, folder)
    printed = capfd.readouterr()
    assert tracker not in printed.out.replace(f"in {folder}", "").lower()
    assert printed.err == ""
    (logged,) = _READ[tracker](folder)
    _assert_logged(logged, folder, epochs=2, images={1, 2})
    assert logged.config["penalty"]["l2"] == 0.5
    # A run of its own for the next one of a sweep.
    tkn.run(config, tmp_path / "other")
    assert len(_READ[tracker](folder)) == len(_READ[tracker](tmp_path / "other")) == 1


def test_a_continued_run_goes_on_in_the_same_tracker_run(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*TINY, f"logger={tracker}", "logger.images_every_epochs=1")
    folder = tmp_path / "run"
    step = TargetedTraining.training_step

    def power_cut(self: TargetedTraining, batch: Any, batch_index: int) -> torch.Tensor:
        if self.current_epoch == 2:
            raise RuntimeError("power cut")
        return step(self, batch, batch_index)

    monkeypatch.setattr(TargetedTraining, "training_step", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        tkn.run(compose(*arguments, "trainer.max_epochs=3"), folder)
    monkeypatch.setattr(TargetedTraining, "training_step", step)
    # More epochs than before: another configuration.
    tkn.run(compose(*arguments, "trainer.max_epochs=4", f"checkpoint={folder / 'last.ckpt'}"), folder)
    (logged,) = _READ[tracker](folder)
    _assert_logged(logged, folder, epochs=4, images={1, 2, 3, 4})


@pytest.mark.slow
def test_one_of_two_processes_logs(tmp_path: Path) -> None:
    tkn.run(compose(*TINY, "logger=tensorboard", "trainer.max_epochs=2", "trainer.devices=2"), tmp_path)
    (logged,) = _read_tensorboard(tmp_path)
    _assert_logged(logged, tmp_path, epochs=2, images={1, 2})


@pytest.mark.slow
def test_tensorboard_drops_an_earlier_run_in_the_folder(tmp_path: Path) -> None:
    for epochs in (3, 2):
        (tmp_path / "config.yaml").unlink(missing_ok=True)  # else the folder would be refused
        tkn.run(compose(*TINY, "logger=tensorboard", f"trainer.max_epochs={epochs}"), tmp_path)
    (logged,) = _read_tensorboard(tmp_path)
    _assert_logged(logged, tmp_path, epochs=2, images={1, 2})


@pytest.mark.slow
@_MLFLOW_WARNING
def test_mlflow_runs_end_as_they_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    arguments = (*TINY, "logger=mlflow", f"logger.tracking_uri={uri}", "trainer.max_epochs=1")
    folder = tmp_path / "run"

    def status() -> str:
        run_id = json.loads((folder / "logger.json").read_text())["mlflow"]
        return MlflowClient(uri).get_run(run_id).info.status

    with pytest.raises(ValueError, match="training loss became"):
        tkn.run(compose(*arguments, "recipe.optimizer.lr=1e30"), folder)
    assert status() == "FAILED"
    (folder / "config.yaml").unlink()  # else the folder would be refused
    tkn.run(compose(*arguments), folder)
    assert status() == "FINISHED"
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.slow
def test_a_tracker_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = compose("data=pain", f"data_dir={tmp_path}", "logger=mlflow", "logger.tracking_uri=http://localhost:1")
    with pytest.raises(ValueError, match=r"^logger=mlflow: .*localhost"):
        tkn.run(config, tmp_path)
