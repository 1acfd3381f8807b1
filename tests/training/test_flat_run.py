"""`attention=flat` through the command: its ROIs shrink, its checkpoint tests to the same error and is told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import TINY

import tkn
from tkn.cli import compose
from tkn.layers import roi_layers


@pytest.mark.usefixtures("empty_pictures")
def test_a_run_with_flat_windows(tmp_path: Path) -> None:
    network = (*TINY, "model=tdn10", "attention=flat", "engine=dense")
    train = ("penalty.l2=0.5", "trainer.max_epochs=2")
    summary, objects = tkn.run(compose(*network, *train), tmp_path / "train")
    assert summary["attention"]["name"] == "flat"
    assert {layer.attention for layer in roi_layers(objects["module"].model).values()} == {"flat"}
    assert summary["macs_roi"] < 0.9 * summary["macs_dense"]
    test = ("mode=test", f"checkpoint={tmp_path / 'train' / 'last.ckpt'}")
    tested, _ = tkn.run(compose(*network, *test), tmp_path / "test")
    assert tested["error"] == summary["error"]
    with pytest.raises(ValueError, match="attention"):
        tkn.run(compose(*network, "attention=cauchy", *test), tmp_path / "other")
