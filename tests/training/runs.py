"""Short runs on embedded digits, and their comparison."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch

TINY = ("data=mnist", "data.source=embedded", "data.limit=96", "recipe.batch_size=32", "trainer.limit_val_batches=2")
TINY = (*TINY, "trainer.limit_test_batches=2", "trainer.accelerator=cpu")


def metrics_rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without its times."""
    with (folder / "metrics.csv").open() as file:
        return [
            {key: value for key, value in row.items() if not key.endswith("seconds")} for row in csv.DictReader(file)
        ]


def recorded_rois(folder: Path) -> dict[str, np.ndarray]:
    """rois.npz, or nothing where there is none."""
    path = folder / "rois.npz"
    if not path.is_file():
        return {}
    with np.load(path) as file:
        return dict(file)


def assert_same_run(one: Path, other: Path) -> None:
    """The runs in both folders came, bit for bit, to the same results."""
    assert metrics_rows(one) == metrics_rows(other)
    rois = recorded_rois(one)
    assert rois.keys() == recorded_rois(other).keys()
    for name, array in recorded_rois(other).items():
        assert np.array_equal(rois[name], array), name
    for name in ("last.ckpt", "best.ckpt"):
        weights, expected = (
            torch.load(folder / name, map_location="cpu", weights_only=True)["state_dict"] for folder in (one, other)
        )
        assert weights.keys() == expected.keys()
        for key, weight in weights.items():
            assert torch.equal(weight, expected[key]), (name, key)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for summary in summaries:
        for key in ("wall_seconds", "train_seconds"):
            assert summary.pop(key) > 0
    assert summaries[0] == summaries[1]
