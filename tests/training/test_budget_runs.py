"""Runs with `penalty=budget`, from configuration to files, on a few embedded digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import TINY, assert_same_run, metrics_rows

import tkn
from tkn.cli import compose
from tkn.training import cuda_graphs, module
from tkn.training.module import TargetedTraining

pytestmark = pytest.mark.usefixtures("empty_pictures")

#: Four epochs of three steps; the budget is met after the second.
BUDGET = (*TINY, "model=tdn10", "penalty=budget", "penalty.share=0.4", "trainer.max_epochs=4", "recipe.warmup=0")
DENSE = 11_317_030
ASKED = round(0.4 * DENSE)


def _within(macs: float) -> bool:
    return 0.98 * ASKED <= macs <= ASKED


@pytest.mark.parametrize(
    ("overrides", "met"),  # and after which epoch it is
    [
        (("penalty.reach=0.7", "recipe.batch_size=16"), 3),
        (("recipe=modern", "recipe.batch_size=32"), 2),
        (
            ("recipe=gtsrb", "penalty.share=null", f"penalty.macs={ASKED}", "data.validation=16"),
            2,
        ),
    ],
    ids=["late", "averaged", "adam"],
)
def test_the_budget_is_met_by_what_is_tested(tmp_path: Path, overrides: tuple[str, ...], met: int) -> None:
    summary, objects = tkn.run(compose(*BUDGET, *overrides), tmp_path)
    assert _within(summary["macs_roi"])
    assert (summary["penalty"]["asked"], summary["penalty"]["met"]) == (ASKED, summary["macs_roi"])
    assert objects["module"].count_macs().total_roi == summary["macs_roi"]
    counts = [float(row["macs_roi"]) for row in metrics_rows(tmp_path)]
    assert counts == sorted(counts, reverse=True)
    assert [_within(macs) for macs in counts] == [epoch >= met for epoch in (1, 2, 3, 4)]
    assert summary["best_epoch"] >= met
    errors = [float(row[objects["module"].monitor]) for row in metrics_rows(tmp_path)]
    assert summary["best_error"] == min(errors[met - 1 :])
    # What is saved as the best network has the budget's ROIs.
    tested, _ = tkn.run(
        compose(*TINY, "model=tdn10", "mode=test", f"checkpoint={tmp_path / 'best.ckpt'}"), tmp_path / "test"
    )
    assert tested["macs_roi"] == summary["macs_roi"]
    assert tested["penalty"] == summary["penalty"]


@pytest.mark.parametrize("cut", [(0, 2), (1, 1), (2, 1)], ids=["before", "within", "after"])
def test_an_interrupted_run_comes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: tuple[int, int]
) -> None:
    config = compose(*BUDGET, "recipe.ema_decay=0.9", "penalty.reach=0.6", "model.dropout=0.1")
    tkn.run(config, tmp_path / "whole")
    step = TargetedTraining.training_step

    def power_cut(self: TargetedTraining, batch: Any, batch_index: int) -> Any:
        if (self.current_epoch, batch_index) == cut:
            # As a signal does.
            self.trainer.save_checkpoint(tmp_path / "broken" / "last.ckpt") if batch_index == 0 else None
            raise RuntimeError("power cut")
        return step(self, batch, batch_index)

    monkeypatch.setattr(TargetedTraining, "training_step", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        tkn.run(config, tmp_path / "broken")
    monkeypatch.setattr(TargetedTraining, "training_step", step)
    tkn.run(config, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


class CalledAgain:
    """In place of `Captured`: capturing runs nothing, replaying calls the function."""

    captured = 0

    def __init__(self, function: Any) -> None:
        CalledAgain.captured += 1
        self.replay = function


def test_captured_steps_see_the_plan_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(*BUDGET, "data.limit=52", "recipe.batch_size=8", "trainer.max_epochs=2", "penalty.reach=0.8")
    tkn.run(config, tmp_path / "plain")
    monkeypatch.setattr(module, "supports_cuda_graphs", lambda _device: True)
    monkeypatch.setattr(cuda_graphs, "Captured", CalledAgain)
    tkn.run(config, tmp_path / "graphs")
    # The gradients, what follows while the ROIs shrink, and what follows when they are held.
    assert CalledAgain.captured == 3
    assert_same_run(tmp_path / "plain", tmp_path / "graphs")


def test_processes_agree(tmp_path: Path) -> None:
    two = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=2", "data.limit=64")
    summary = tkn.run(compose(*BUDGET, *two), tmp_path / "two")[0]
    assert _within(summary["macs_roi"])
    # The first process saves, and all of them have a part in the evaluation of what is counted.
    tested, _ = tkn.run(
        compose(*TINY, "model=tdn10", "mode=test", f"checkpoint={tmp_path / 'two/last.ckpt'}"), tmp_path / "test"
    )
    assert tested["macs_roi"] == summary["macs_roi"]


def test_another_budget_begins_where_a_run_goes_on(tmp_path: Path) -> None:
    """From a run without one, from one of another, and when the run gets longer."""
    short = [override for override in BUDGET if not override.startswith(("penalty", "trainer.max_epochs"))]
    tkn.run(compose(*short, "trainer.max_epochs=1"), tmp_path / "l2")
    state = ("checkpoint=", "trainer.max_epochs=3", "penalty.reach=0.6")
    for name, checkpoint, overrides in (
        ("later", "l2", ()),
        ("smaller", "later", ("penalty.share=0.35", "trainer.max_epochs=6", "penalty.reach=0.7")),
        ("longer", "later", ("trainer.max_epochs=6", "penalty.reach=0.9")),
    ):
        path = f"{state[0]}{tmp_path / checkpoint / 'last.ckpt'}"
        summary, _ = tkn.run(compose(*BUDGET, *state[1:], *overrides, path), tmp_path / name)
        asked = summary["penalty"]["asked"]
        assert 0.98 * asked <= summary["macs_roi"] <= asked
    # A budget that is met stays so in a longer run.
    assert [_within(float(row["macs_roi"])) for row in metrics_rows(tmp_path / "longer")] == [False] + [True] * 5
    with pytest.raises(ValueError, match=r"penalty\.reach=0\.1 is after 1 steps, but the run goes on after 3"):
        tkn.run(compose(*BUDGET, "penalty.reach=0.1", f"checkpoint={tmp_path / 'l2/last.ckpt'}"), tmp_path / "too_late")


def test_a_kernel_can_be_penalised_by_its_costs(tmp_path: Path) -> None:
    """With a strong penalty by costs, early kernels, which cost more, end smaller than late ones; without, not."""
    shares = {}
    for name in ("l2", "l2_costs"):
        arguments = (*TINY, "model=tdn10", f"penalty={name}", "penalty.beta=1", "penalty.l2=0.5")
        summary, _ = tkn.run(compose(*arguments, "trainer.max_epochs=1"), tmp_path / name)
        rows = summary["target_layers"]
        shares[name] = [rows[index]["macs_roi"] / rows[index]["macs_dense"] for index in (0, -1)]
    assert shares["l2"][0] > 1.5 * shares["l2_costs"][0]
    assert shares["l2_costs"][1] > 1.5 * shares["l2"][1]
    assert json.loads((tmp_path / "l2_costs/summary.json").read_text())["penalty"]["costs"] is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("penalty.share=0.2",), r"penalty=budget: share=0\.2 .* the least is 3439942 .*model\.layers=all"),
        (("penalty.share=null", "penalty.macs=12e6"), r"macs=1\.2e\+07 is more than the 11317030 multiply-adds"),
        (("model=dn10",), "penalty=budget: the network has no target layers"),
        (("penalty.share=null",), r"penalty\.share=None must be a share"),
        (("penalty.macs=5e6",), r"penalty\.macs=5000000\.0 must be null with penalty\.share=0\.4"),
        (("penalty.share=1.5",), r"penalty\.share=1\.5 must be null or within \(0, 1\]"),
        (("penalty.reach=0",), r"penalty\.reach=0\.0 must be a fraction of the run within \(0, 1\]"),
    ],
)
def test_impossible_budgets_stop_before_training(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tkn.run(compose(*BUDGET, *overrides), tmp_path)
    assert not (tmp_path / "last.ckpt").exists()


def test_a_run_that_ends_before_its_budget_is_met_has_no_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: TargetedTraining) -> None:
        self.trainer.should_stop = True

    monkeypatch.setattr(TargetedTraining, "on_train_epoch_end", stop)
    summary, _ = tkn.run(compose(*BUDGET, "penalty.reach=1", "data.validation=16"), tmp_path)
    assert (summary["tested"], summary["best_epoch"], summary["epochs"]) == ("last", None, 1)
    assert not (tmp_path / "best.ckpt").exists()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["budget"]["macs"] == ASKED


def test_a_best_network_above_a_smaller_budget_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*BUDGET, "data.validation=16")
    tkn.run(compose(*arguments, "trainer.max_epochs=1", "penalty.share=0.9", "penalty.reach=0.1"), tmp_path / "first")
    assert (tmp_path / "first" / "best.ckpt").is_file()
    smaller = (*arguments, "penalty.reach=1", f"checkpoint={tmp_path / 'first' / 'last.ckpt'}")

    def stop(self: TargetedTraining) -> None:
        self.trainer.should_stop = True

    with monkeypatch.context() as patch:
        patch.setattr(TargetedTraining, "on_train_epoch_end", stop)
        summary, _ = tkn.run(compose(*smaller), tmp_path / "short")
    assert (summary["tested"], summary["best_epoch"], summary["epochs"]) == ("last", None, 2)
    assert not (tmp_path / "short" / "best.ckpt").exists()
    (tmp_path / "short" / "summary.json").unlink()
    summary, _ = tkn.run(compose(*smaller), tmp_path / "short")
    assert (summary["tested"], summary["best_epoch"]) == ("best", 4)
    assert _within(summary["macs_roi"])
