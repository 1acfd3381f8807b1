"""What a sweep learns of a run: the values to minimise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig

from tkn.training.run import run


class Objectives(NamedTuple):
    """Both are to be minimised. `error`: percent, or the mean squared error of a regression."""

    error: float
    macs_roi: float


class PrunedObjectives(Objectives):
    """Those of a run that was ended early: what it had come to by then."""


def objectives(summary: Mapping[str, Any]) -> Objectives:
    """A run's objectives, from its summary.

    The error is that on held-out training images if there are any (data.validation), else that on the test set.
    """
    name = "error" if "error" in summary else "mse"
    key = f"best_{name}" if summary["best_chosen_on"] == "valid" else name
    kind = Objectives if summary["pruned_epoch"] is None else PrunedObjectives
    return kind(float(summary[key]), float(summary["macs_roi"]))


def run_for_objectives(config: DictConfig) -> Objectives:
    """`tkn.run`, for a sweep."""
    metrics, _ = run(config)
    return objectives(metrics)
