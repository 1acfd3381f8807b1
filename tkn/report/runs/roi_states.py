"""Where a run's kernels looked: the ROIs that it recorded by epoch, or those of its last checkpoint."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tkn.app.messages import message
from tkn.drawing.coverage import coverage
from tkn.drawing.mosaic import Mosaic, make_mosaic
from tkn.layers import AttentiveRegularization2d, roi_layers
from tkn.report.runs.run import Run
from tkn.training.records.checkpoint import checkpoint_network

#: Of layers of more than these no picture shows each.
MANY_KERNELS = 64


@dataclass(frozen=True)
class RoiStates:
    """loc and scale of every target layer at the recorded epochs.

    layers: by name (loc [N, 2, C], scale [N, 2, C], the map's (height, width)), N of `epochs`.
    """

    epochs: Sequence[int]
    layers: Mapping[str, tuple[Tensor, Tensor, tuple[int, int]]]
    attention: str
    scale_unit: float

    @property
    def kernels(self) -> int:
        """How many the layer with most has."""
        return max(loc.shape[2] for loc, _scale, _size in self.layers.values())

    def mosaic(self, layer: str, state: int) -> Mosaic:
        """The layer's attention maps (Eq. 13) and ROIs (Eq. 15) at epoch `epochs[state]`."""
        window, size = self._window(layer, state)
        return make_mosaic(window.window(size), window.rois(size))

    def coverage(self, layer: str, state: int) -> NDArray[np.float64]:
        """[H, W]: the share of the layer's kernels whose ROI covers each pixel at epoch `epochs[state]`."""
        window, size = self._window(layer, state)
        return coverage(window.rois(size), size)

    def _window(self, layer: str, state: int) -> tuple[AttentiveRegularization2d, tuple[int, int]]:
        loc, scale, size = self.layers[layer]
        window = AttentiveRegularization2d(loc.shape[2], attention=self.attention, scale_unit=self.scale_unit)
        with torch.no_grad():
            window.loc.copy_(loc[state])
            window.scale.copy_(scale[state])
        return window, size


def layer_title(name: str) -> str:
    """How figures call a layer: 0 is "layer 0", block1.0.layers.conv1 is "block1.0 conv1"."""
    return f"layer {name}" if name.isdigit() else name.replace(".layers.", " ")


def checkpoint_path(run: Run) -> Path:
    """The checkpoint of the model that the run's summary reports."""
    return run.folder / ("best.ckpt" if run.tests_best else "last.ckpt")


def trained_model(run: Run) -> tuple[nn.Module, dict[str, Any]]:
    """The network of the run's checkpoint and what it says of itself. ValueError if it is missing or damaged."""
    try:
        return checkpoint_network(checkpoint_path(run))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(message(error)) from error


def read_states(run: Run) -> RoiStates:
    """The states in rois.npz, else the one of the checkpoint. ValueError if neither can be read."""
    attention: dict[str, Any] = run.result["attention"]
    if (run.folder / "rois.npz").exists():
        epochs, layers = _recorded(run.folder / "rois.npz")
    elif checkpoint_path(run).exists():
        epochs, layers = _of_checkpoint(run)
    else:
        raise ValueError(f"{run.name} has neither rois.npz nor {checkpoint_path(run).name}")
    return RoiStates(epochs, layers, attention["name"], attention["scale_unit"])


def _recorded(path: Path) -> tuple[list[int], dict[str, tuple[Tensor, Tensor, tuple[int, int]]]]:
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            arrays = dict(file)
        epochs = [int(epoch) for epoch in arrays.pop("epochs")]
        layers = {}
        for name in (key.removesuffix(".size") for key in arrays if key.endswith(".size")):
            loc, scale = torch.from_numpy(arrays[f"{name}.loc"]), torch.from_numpy(arrays[f"{name}.scale"])
            height, width = map(int, arrays[f"{name}.size"])
            if loc.shape != scale.shape or loc.shape[:2] != (len(epochs), 2):
                raise ValueError(f"layer {name} has loc {list(loc.shape)} and scale {list(scale.shape)}")
            layers[name] = (loc, scale, (height, width))
        if not (epochs and layers):
            raise ValueError("no epoch or no layer")
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {message(error)}") from error
    return epochs, layers


def _of_checkpoint(run: Run) -> tuple[list[int], dict[str, tuple[Tensor, Tensor, tuple[int, int]]]]:
    model, _identity = trained_model(run)
    sizes = {row["name"]: tuple(row["map_size"]) for row in run.result.get("target_layers") or ()}
    if sizes.keys() != roi_layers(model).keys():
        raise ValueError(f"{checkpoint_path(run)} has other target layers than the summary")
    layers = {name: (layer.loc[None], layer.scale[None], sizes[name]) for name, layer in roi_layers(model).items()}
    return [run.epoch], layers
