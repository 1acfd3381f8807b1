"""Checkpoints of earlier versions are tested and continued: they named no attention function, and no architecture."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from runs import TINY, assert_same_run

import tkn
from tkn.cli import compose

ARGUMENTS = (*TINY, "model=tdn10", "attention=gaussian", "penalty.l2=0.01", "engine=dense")


def test_a_checkpoint_that_names_no_attention_function(tmp_path: Path) -> None:
    now, earlier = tmp_path / "now", tmp_path / "earlier"
    tkn.run(compose(*ARGUMENTS, "trainer.max_epochs=1"), now)
    shutil.copytree(now, earlier)
    for path in (earlier / "last.ckpt", earlier / "best.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        metadata = checkpoint["state_dict"]._metadata
        assert metadata["model.block1.0.layers.conv1"]["attention"] == "gaussian"
        for entry in metadata.values():
            entry.pop("attention", None)
            entry.pop("scale_unit", None)
        torch.save(checkpoint, path)
    errors = []
    for folder in (now, earlier):
        checkpoint = f"checkpoint={folder / 'last.ckpt'}"
        tested, _ = tkn.run(compose(*ARGUMENTS, "mode=test", checkpoint), folder / "tested")
        tkn.run(compose(*ARGUMENTS, "trainer.max_epochs=2", checkpoint), folder / "continued")
        errors.append(tested["error"])
    assert errors[0] == errors[1]
    assert_same_run(now / "continued", earlier / "continued")


def test_a_checkpoint_that_says_no_architecture(tmp_path: Path) -> None:
    now, earlier = tmp_path / "now", tmp_path / "earlier"
    arguments = (*ARGUMENTS, "model.dropout=0.5")
    tkn.run(compose(*arguments, "trainer.max_epochs=1"), now)
    shutil.copytree(now, earlier)
    for path in (earlier / "last.ckpt", earlier / "best.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["tkn"]["architecture"], checkpoint["tkn"]["config"]["channels"]
        del checkpoint["tkn"]["rois"], checkpoint["tkn"]["config"]["rois"]
        torch.save(checkpoint, path)
    for folder in (now, earlier):
        checkpoint = f"checkpoint={folder / 'last.ckpt'}"
        _, objects = tkn.run(compose(*arguments, "trainer.max_epochs=2", checkpoint), folder / "continued")
        rates = {module.p for module in objects["module"].model.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == {0.5}
    assert_same_run(now / "continued", earlier / "continued")
