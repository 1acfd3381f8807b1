"""What the author's own counter would report of a run, to stand beside the paper's figures (docs/method.md)."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from tkn.report.runs.roi_states import read_states
from tkn.report.runs.run import Run


def author_count(run: Run) -> float:
    """A targeted run's multiply-adds for one image with ROIs as wide as the author's countFlops.py takes them.

    Of the epoch whose model the summary reports. ValueError if the run has no readable rois.npz or checkpoint.
    """
    states, summary = read_states(run), run.result
    if run.epoch not in states.epochs:
        raise ValueError(f"{run.name} has no ROIs of epoch {run.epoch}")
    for key in ("macs_dense", "macs_roi"):
        if any(key not in layer for layer in summary["target_layers"]):
            raise ValueError(f"summary.json of {run.name} has layers without {key}")
    state = states.epochs.index(run.epoch)
    attention = summary["attention"] or {}
    # Of parts there are so many kernels for each of the dense layer's.
    kernels = attention["windows"] if attention.get("combine") == "parts" else 1
    total = float(summary["macs_roi"])
    for layer in summary["target_layers"]:
        loc, scale, size = states.layers[layer["name"]]
        share = author_pixels(size, loc[state], scale[state]).mean().item() / (size[0] * size[1])
        total += kernels * layer["macs_dense"] * share - layer["macs_roi"]
    return total


def author_pixels(size: tuple[int, int], loc: Tensor, scale: Tensor) -> Tensor:
    """Pixels of each kernel's ROI by the author's counter: loc and scale [2, C] -> float64 [C].

    Along an axis of L pixels a ROI with the edges a and b counts hi - lo - 1 pixels, lo = floor(a) and
    hi = floor(b + 1), both within [0, L - 1]: two too few where it reaches the far end of the map.
    """
    length = torch.tensor(size, dtype=torch.float64).unsqueeze(1)
    loc, half = loc.double(), scale.double() / sqrt(2)
    lo = ((loc - half) * length).floor().clamp(min=0).minimum(length - 1)
    hi = ((loc + half) * length + 1).floor().clamp(min=0).minimum(length - 1)
    return (hi - lo - 1).clamp(min=0).prod(dim=0)
