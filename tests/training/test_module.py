"""What the LightningModule keeps of an epoch, and what its checkpoints hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training.runs import TINY

import tkn
from tkn.cli import compose
from tkn.training.module import MeanOverImages


def test_the_mean_is_over_images_not_batches() -> None:
    mean = MeanOverImages()
    mean.update(torch.tensor(1.0), 3)
    mean.update(torch.tensor(5.0), 1)
    assert mean.compute() == 2
    assert mean.sums().tolist() == [8, 4]
    mean.update(torch.tensor(torch.nan), 1)
    assert mean.compute().isnan()


@pytest.mark.parametrize(("recipe", "networks"), [("mnist", {"model"}), ("modern", {"model", "raw"})])
def test_checkpoints_have_the_keys_of_the_first_version(tmp_path: Path, recipe: str, networks: set[str]) -> None:
    """Renamed metrics, averages, schedules or callbacks would part new versions from old checkpoints."""
    tkn.run(compose(*TINY, "model=tdn10", f"recipe={recipe}", "trainer.max_epochs=1"), tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    ours = {"tkn", "train_sums", "state_dict", "optimizer_states", "lr_schedulers", "callbacks"}
    assert ours < checkpoint.keys()
    first = {"model", "input_size", "num_outputs", "architecture", "pretrained", "config"}
    assert checkpoint["tkn"].keys() == first | {"rois"}
    names = [name.split(".", 1) for name in checkpoint["state_dict"]]
    assert {network for network, _ in names} == networks
    plain = list(tkn.build_model("tdn10", (1, 28, 28), 10).state_dict())
    for network in networks:
        assert [name for prefix, name in names if prefix == network] == plain
    assert list(checkpoint["callbacks"]) == ["History", "RoiHistory", "Prune", "LastAndBest"]
    (schedule,) = checkpoint["lr_schedulers"]
    assert schedule["last_epoch"] == 3
    assert schedule["lr_lambdas"] == [None, None]
