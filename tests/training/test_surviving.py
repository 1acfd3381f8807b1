"""Runs that are stopped, killed or run out of disk, and go on to the same result."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import TKN_RUN, ForkedPython
from omegaconf import DictConfig, OmegaConf
from runs import TINY, assert_same_run, metrics_rows

import tkn
from tkn.app.files import own_folder
from tkn.app.signals import Interrupted
from tkn.cli import compose
from tkn.training.module import TargetedTraining

pytestmark = pytest.mark.usefixtures("empty_pictures")

#: Three batches an epoch, dropout, and a penalty that moves the ROIs.
ARGUMENTS = (*TINY, "model=tdn10", "model.dropout=0.2", "trainer.max_epochs=2", "penalty.l2=0.01", "engine=roi")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    tkn.run(compose(*ARGUMENTS), folder)
    return folder


def _signal_once(monkeypatch: pytest.MonkeyPatch, method: str, call: int, number: int) -> None:
    """Send this process a signal in the n-th call of a method of the module."""
    original = getattr(TargetedTraining, method)
    calls = 0

    def signalling(self: TargetedTraining, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(TargetedTraining, method, signalling)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
def test_a_signal_in_any_step_saves_and_the_run_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, step: int
) -> None:
    _signal_once(monkeypatch, "training_step", step, signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"hydra\.run\.dir=") as interrupted:
        tkn.run(compose(*ARGUMENTS), tmp_path)
    assert interrupted.value.exit_code == 143
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    # Before the last step of an epoch a checkpoint is written anyway; that step is done again.
    assert saved["global_step"] == {1: 1, 2: 2, 3: 2, 4: 4, 5: 5, 6: 5}[step]
    assert not (tmp_path / "summary.json").exists()
    tkn.run(compose(*ARGUMENTS), tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("call", [1, 3, 4])
def test_a_signal_in_the_evaluation_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, call: int
) -> None:
    _signal_once(monkeypatch, "validation_step", call, signal.SIGINT)
    with pytest.raises(Interrupted) as interrupted:
        tkn.run(compose(*ARGUMENTS), tmp_path)
    assert interrupted.value.exit_code == 130
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == (2 if call == 1 else 5)
    tkn.run(compose(*ARGUMENTS), tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_signal_in_the_final_test_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    _signal_once(monkeypatch, "test_step", 1, signal.SIGTERM)
    with pytest.raises(Interrupted):
        tkn.run(compose(*ARGUMENTS), tmp_path)

    def trained_again(*_args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(TargetedTraining, "training_step", trained_again)
    tkn.run(compose(*ARGUMENTS), tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_second_signal_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = TargetedTraining.training_step

    def impatient(self: TargetedTraining, *args: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(TargetedTraining, "training_step", impatient)
    with pytest.raises(Interrupted, match=r"^interrupted$"):
        tkn.run(compose(*ARGUMENTS), tmp_path)
    assert not (tmp_path / "last.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "arguments",
    [
        (*ARGUMENTS, "trainer.max_epochs=1", "recipe.batch_size=16", "trainer.accumulate_grad_batches=2"),
        (*ARGUMENTS, "data.validation=32", "data.limit=128"),
        (*ARGUMENTS, "attention.clip=false", "recipe.optimizer.name=Adam", "~recipe.optimizer.momentum"),
        (
            *(*ARGUMENTS, "recipe.ema_decay=0.9", "recipe.label_smoothing=0.1", "recipe.attention_lr_factor=0.5"),
            *("recipe.lr_schedule=cosine", "recipe.warmup=0.25", "penalty.start=0.2", "penalty.end=0.7"),
        ),
        (
            *("data=pain_synthetic", "model=tdn10", "data.limit=24", "recipe.batch_size=8", "trainer.max_epochs=1"),
            *("trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.accelerator=cpu"),
        ),
    ],
    ids=["accumulated", "validation", "soft, Adam", "averaged", "augmented"],
)
def test_what_else_a_checkpoint_must_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    if "~recipe.optimizer.momentum" in arguments:
        arguments = (*arguments, "~recipe.optimizer.nesterov")
    config = compose(*arguments, f"data_dir={tmp_path}")
    tkn.run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _signal_once(patch, "training_step", 2, signal.SIGTERM)
        with pytest.raises(Interrupted):
            tkn.run(config, tmp_path / "broken")
    tkn.run(config, tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_nobody_needs_to_read_that_a_signal_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    _signal_once(monkeypatch, "training_step", 2, signal.SIGTERM)
    kept = os.dup(2)
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)  # as of a pipe whose other end is gone
    try:
        with pytest.raises(Interrupted):
            tkn.run(compose(*ARGUMENTS), tmp_path)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writer)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    tkn.run(compose(*ARGUMENTS), tmp_path)
    assert_same_run(tmp_path, whole)


def test_two_processes_do_not_run_in_one_folder(tmp_path: Path) -> None:
    left, kept = tmp_path / ".tkn-last-123.ckpt", tmp_path / ".hydra"
    left.touch()
    kept.mkdir()
    with own_folder(tmp_path):
        assert not left.exists()  # of a process that was killed as it wrote
        with pytest.raises(ValueError, match="is in use: another process runs in it"):
            tkn.run(compose(*ARGUMENTS), tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_a_finished_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(TargetedTraining, "__init__", None)
    # Where it logs to and where the data lie make no other run of it.
    metrics, objects = tkn.run(compose(*ARGUMENTS, "logger=tensorboard", "data_dir=elsewhere"), tmp_path)
    assert metrics["epochs"] == 2
    assert objects.keys() == {"config", "output_dir"}
    # Nor do keys that are newer than it.
    stored = OmegaConf.load(tmp_path / "config.yaml")
    assert isinstance(stored, DictConfig)
    del stored["channels"], stored["rois"], stored.model["freeze"]
    OmegaConf.save(stored, tmp_path / "config.yaml")
    assert tkn.run(compose(*ARGUMENTS), tmp_path)[0] == metrics
    with pytest.raises(ValueError, match=r"another run, of .*, channels\.macs=None; "):
        tkn.run(compose(*ARGUMENTS, "model=dn10", "channels.checkpoint=x", "channels.macs=1e6"), tmp_path)
    assert_same_run(tmp_path, whole)


def test_another_run_does_not_overwrite_a_folder(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"holds another run, of penalty\.l2=0\.01; this one is of penalty\.l2=0\.02:"):
        tkn.run(compose(*ARGUMENTS, "penalty.l2=0.02"), tmp_path)
    with pytest.raises(ValueError, match=r"another run, of mode=train, checkpoint=None; this one is of mode=test, "):
        tkn.run(compose(*ARGUMENTS, "mode=test", f"checkpoint={whole / 'last.ckpt'}"), tmp_path)
    assert_same_run(tmp_path, whole)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        tkn.run(compose(*ARGUMENTS), tmp_path)


def _in_new_processes(*arguments: object) -> None:
    """Run the script beside this file, which runs ARGUMENTS in processes that die."""
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        input=" ".join(ARGUMENTS),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_killed_twenty_times_comes_to_the_same_result(tmp_path: Path) -> None:
    _in_new_processes("random", tmp_path)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert (tmp_path / "kills").read_text() == "20"


@pytest.mark.slow
def test_a_run_killed_while_it_writes_comes_to_the_same_result(tmp_path: Path, whole: Path) -> None:
    _in_new_processes("writing", tmp_path)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) > 12
    for folder in folders:
        assert_same_run(folder, whole)


@contextmanager
def _started(folder: Path, *arguments: str, code: str = TKN_RUN) -> Iterator[ForkedPython]:
    """The command in a process of its own, which has come to its first best.ckpt in the folder (or did before)."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    overrides = [*ARGUMENTS, *(argument for argument in arguments if argument not in flags)]
    process = ForkedPython(code, *flags, *overrides, folder=folder, HYDRA_FULL_ERROR="0")
    try:
        while not list(folder.glob("**/best.ckpt")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        yield process
    finally:
        process.kill()


def _end(process: ForkedPython) -> str:
    """Its one line on stderr."""
    _, errors = process.communicate(timeout=120)
    (line,) = (line for line in errors.splitlines() if not line.startswith("stopping after this step"))
    return line


def test_the_command_says_how_to_go_on_and_does(tmp_path: Path) -> None:
    arguments = ("trainer.max_epochs=6", "hydra.run.dir=run")
    with _started(tmp_path, *arguments) as process:
        process.send_signal(signal.SIGTERM)
        line = _end(process)
    assert process.returncode == 143
    assert line == "tkn-run: interrupted: the same command with hydra.run.dir=run continues it"
    before = metrics_rows(tmp_path / "run")
    assert len(before) < 6
    with _started(tmp_path, *arguments) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "holds an unfinished run: going on with it" in output
    assert metrics_rows(tmp_path / "run")[: len(before)] == before
    assert len(metrics_rows(tmp_path / "run")) == 6


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    arguments = ("-m", "trainer.max_epochs=4", "seed=0,1", "hydra.sweep.dir=sweep")
    with _started(tmp_path, *arguments) as process:
        while not (tmp_path / "sweep/1/last.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert _end(process).endswith("the same command with hydra.sweep.dir=sweep continues it")
    assert process.returncode == 130
    finished = (tmp_path / "sweep/0/summary.json").stat().st_mtime_ns
    with _started(tmp_path, *arguments) as process:
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert (tmp_path / "sweep/0/summary.json").stat().st_mtime_ns == finished
    assert len(metrics_rows(tmp_path / "sweep/1")) == 4


def _assert_good_checkpoint(folder: Path) -> None:
    assert not (folder / "summary.json").exists()
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert saved["global_step"] > 0
    hidden = {path.name for path in folder.iterdir() if path.name.startswith(".") and path.is_file()}
    assert hidden <= {".tkn-lock"}  # nobody can remove it from an unwritable folder


def test_a_disk_without_room_ends_the_run_with_an_error(tmp_path: Path) -> None:
    with _started(tmp_path, "trainer.max_epochs=1000", "hydra.run.dir=run") as process:
        # No file may grow beyond what a checkpoint needs: the system's answer to a write is as on a full disk.
        room = (tmp_path / "run/last.ckpt").stat().st_size // 2
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
        line = _end(process)
    assert process.returncode == 1
    assert line.startswith("tkn-run: error: [Errno 27] File too large: ")
    assert line.endswith("run/last.ckpt'")
    assert "the run ends; its last good checkpoint is" in (tmp_path / "run/tkn-run.log").read_text()
    _assert_good_checkpoint(tmp_path / "run")


#: Root too obeys permissions without its capabilities to override them (1 and 2, of <linux/capability.h>).
OBEY_PERMISSIONS = """
import ctypes
libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
sets[0] &= ~0b110
assert libc.capset(header, sets) == 0
"""


def test_a_folder_that_becomes_unwritable_ends_the_run_with_an_error(tmp_path: Path) -> None:
    arguments = ("trainer.max_epochs=1000", "hydra.run.dir=run")
    with _started(tmp_path, *arguments, code=f"{OBEY_PERMISSIONS}\n{TKN_RUN}") as process:
        (tmp_path / "run").chmod(0o555)
        line = _end(process)
        (tmp_path / "run").chmod(0o755)
    assert process.returncode == 1
    assert line.startswith("tkn-run: error: [Errno 13] Permission denied: ")
    _assert_good_checkpoint(tmp_path / "run")
