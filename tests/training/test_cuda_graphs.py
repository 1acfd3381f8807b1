"""Steps as CUDA graphs, where there is no GPU: what is captured is called again instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.runs import TINY, assert_same_run

import tkn
from tkn.cli import compose
from tkn.training import cuda_graphs, module

pytestmark = pytest.mark.usefixtures("empty_pictures")


class CalledAgain:
    """In place of `Captured`: capturing runs nothing, replaying calls the function."""

    captured = 0
    replays = 0

    def __init__(self, function: Callable[[], Any]) -> None:
        CalledAgain.captured += 1
        self.function = function

    def replay(self) -> Any:
        CalledAgain.replays += 1
        return self.function()


@pytest.mark.parametrize(
    ("overrides", "captured", "replays"),
    [
        # Two epochs of six steps of 8 images and one of 4, which is no graph's; nor are the first three. Two replays
        # a step: the gradients' and the projection's.
        (("model=tdn10", "recipe=modern", "model.dropout=0.1"), 2, 2 * 9),
        # The penalty begins within the second epoch, so the gradients are captured again, and the projection, which may
        # look at them.
        (("model=tkn6", "penalty.start=0.6"), 4, 2 * 9),
        # No ROIs, no projection.
        (("model=dn10",), 1, 9),
        (("model=dn10", "trainer.cuda_graphs=false"), 0, 0),
    ],
)
def test_runs_with_and_without_graphs_learn_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], captured: int, replays: int
) -> None:
    config = compose(*TINY, "data.limit=52", "recipe.epochs=2", *overrides, "recipe.batch_size=8")
    tkn.run(config, tmp_path / "plain")
    monkeypatch.setattr(module, "supports_cuda_graphs", lambda _device: True)
    monkeypatch.setattr(cuda_graphs, "Captured", CalledAgain)
    monkeypatch.setattr(CalledAgain, "captured", 0)
    monkeypatch.setattr(CalledAgain, "replays", 0)
    tkn.run(config, tmp_path / "graphs")
    assert (CalledAgain.captured, CalledAgain.replays) == (captured, replays)
    assert_same_run(tmp_path / "plain", tmp_path / "graphs")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("precision=32-true", True),
        ("precision=bf16-mixed", True),
        ("precision=16-mixed", False),
        ("cuda_graphs=false", False),
        ("compile=true", False),
        ("devices=2", False),
        ("strategy=ddp", False),
        ("accumulate_grad_batches=2", False),
        ("detect_anomaly=true", False),
    ],
)
def test_which_runs_may_be_captured(override: str, expected: bool) -> None:
    assert cuda_graphs.may_capture(compose(f"trainer.{override}").trainer) is expected
