"""All that a report shows of the kernels of one run, measured with its checkpoint on its test images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tkn.app.messages import message
from tkn.data import load_data, loader_options
from tkn.data.base import DataSet
from tkn.drawing.coverage import coverage
from tkn.layers import RoiLayer, roi_layers
from tkn.report.kernels.face_parts import mass_shares, part_masks, reference_points
from tkn.report.kernels.receptive_field import receptive_fields
from tkn.report.kernels.responses import Responses, largest_responses
from tkn.report.kernels.silencing import Rise, silencing_rises
from tkn.report.runs.roi_states import trained_model
from tkn.report.runs.run import Run

#: Images that are shown of a kernel.
_TOP = 6


@dataclass(frozen=True)
class LayerLook:
    """One target layer.

    layer: of the checkpoint, its C kernels; responses: see `Responses`; fields: int64 [C, 2, 2], the receptive fields
    of the ROIs in the image, (lo, hi) of rows and columns; rises: by kernel, the most important first; parts: for each
    part of a face [C], the share of a window's mass within it, none if there are no faces.
    """

    layer: RoiLayer
    responses: Responses
    fields: Tensor
    rises: Mapping[int, Rise]
    parts: Mapping[str, Tensor]

    def coverage(self) -> Tensor:
        """float64 [H, W]: how many of the ROIs hold each pixel of the layer's map."""
        shares = coverage(self.responses.rois, self.responses.size)
        return (torch.from_numpy(shares) * self.layer.num_kernels).round()

    def important(self) -> list[int]:
        """The silenced kernels that have a ROI, the most important first."""
        sides = self.responses.rois[..., 1] - self.responses.rois[..., 0]
        return [kernel for kernel in self.rises if bool((sides[kernel] > 0).all())]


@dataclass(frozen=True)
class Look:
    """A run's kernels. images: float32 [N, C, H, W], the test images as the network gets them, evenly spaced over the
    set; targets: theirs; layers: by name; areas: for each part of a face its share of the whole image.
    """

    run: Run
    data: DataSet
    images: Tensor
    targets: Tensor
    layers: Mapping[str, LayerLook]
    areas: Mapping[str, float]


def look_at(run: Run, data_dir: Path, count: int) -> Look:
    """Measure on `count` test images, or as many as there are.

    ValueError, in one line, without a checkpoint, without the data, for networks and data that a user's own code makes,
    and for a network without two-dimensional target layers.
    """
    model, identity = trained_model(run)
    input_size, options = tuple(identity["input_size"]), identity["config"]["data"]
    data = _data(run, options, data_dir)
    if (data.input_size, data.num_outputs) != (input_size, identity["num_outputs"]):
        raise ValueError(
            f"the data are of {data.input_size} and {data.num_outputs} outputs, the network of {input_size} and "
            f"{identity['num_outputs']}"
        )
    chosen = data.test.evenly(count)
    with torch.no_grad():
        images = data.inputs(chosen).contiguous(memory_format=torch.channels_last)  # as in tests: faster on CPUs
        model(images[:1])  # then the layers that are run know their maps
    layers = {name: layer for name, layer in roi_layers(model).items() if len(layer.map_size or ()) == 2}
    if not layers:
        raise ValueError("it has no target layers of two dimensions")
    fields = receptive_fields(model, data.input_size, layers)
    responses = largest_responses(model, images, layers, _TOP)
    rises = silencing_rises(model, images, chosen.targets, data.task, layers)
    points = reference_points(data)
    masks = {} if points is None else part_masks(points)
    looks = {
        name: LayerLook(layer, responses[name], fields[name], rises[name], mass_shares(layer, masks))
        for name, layer in layers.items()
    }
    areas = {name: float(mask.double().mean()) for name, mask in masks.items()}
    return Look(run, data, images, chosen.targets, looks, areas)


def _data(run: Run, options: Mapping[str, object], data_dir: Path) -> DataSet:
    """As the run had them."""
    name = str(options["name"])
    if name == "python":
        raise ValueError("a report runs no code of a run's, which data=python needs")
    loaded = loader_options(options)
    if "embedded" in run.result["data_source"]:
        loaded["source"] = "embedded"
    try:
        return load_data(name, data_dir, **loaded)
    except (OSError, ValueError) as error:
        raise ValueError(f"its data cannot be loaded: {message(error)}") from error
