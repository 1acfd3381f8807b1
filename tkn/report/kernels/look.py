"""All that a report shows of the kernels of one run, measured with its checkpoint on its test images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tkn.app.messages import message
from tkn.data import load_data, loader_options
from tkn.data.base import DataSet
from tkn.layers import RoiLayer, roi_layers
from tkn.report.kernels.face_parts import mass_shares, part_masks, reference_points
from tkn.report.kernels.receptive_field import box_around, receptive_fields
from tkn.report.kernels.responses import Responses, largest_responses
from tkn.report.kernels.silencing import Rise, silencing_rises
from tkn.report.runs.roi_states import layer_title, trained_model
from tkn.report.runs.run import Run
from tkn.several import PartsConv2d

#: Images that are shown of a kernel.
_TOP = 6


@dataclass(frozen=True)
class LayerLook:
    """One target layer.

    layer: of the checkpoint, its C kernels; responses: see `Responses`; fields: of every response, see
    `receptive_fields`; rises: by kernel, the most important first; faces: for each part of a face [C], the share of a
    window's mass within it, none if there are no faces; parts: of how many parts, each a kernel here, the sums are that
    the checkpoint's layer gives.
    """

    layer: RoiLayer
    responses: Responses
    fields: Tensor
    rises: Mapping[int, Rise]
    faces: Mapping[str, Tensor]
    parts: int = 1

    @property
    def kernels(self) -> int:
        """C"""
        return self.responses.values.shape[1]

    def coverage(self) -> Tensor:
        """float64 [H, W]: how many of the ROIs hold each pixel of the layer's map, the mean over the images."""
        return self.responses.holding.sum(dim=0)

    def important(self) -> list[int]:
        """The silenced kernels that have a ROI, the most important first."""
        return [kernel for kernel in self.rises if self.responses.values[0, kernel] > -torch.inf]

    def label(self, kernel: int) -> str:
        """What a kernel is called: its number, and of parts that of the sum and of the part in it."""
        return f"{kernel // self.parts}.{kernel % self.parts}" if self.parts > 1 else str(kernel)

    def roi_fields(self, rank: int, kernel: int) -> list[Tensor]:
        """The receptive fields of the rectangles of a kernel's ROI in its image `rank`: int64 [2, 2] each."""
        rectangles = self.responses.rois[rank, kernel].tolist()
        fields = self.fields[kernel]
        return [box_around(fields[top:bottom, left:right]) for (top, bottom), (left, right) in rectangles]

    def pixel_field(self, rank: int, kernel: int) -> Tensor:
        """The receptive field of a kernel's largest response in its image `rank`: int64 [2, 2]."""
        row, column = self.responses.pixels[rank, kernel].tolist()
        return self.fields[kernel, row, column].long()


@dataclass(frozen=True)
class Look:
    """A run's kernels. images: float32 [N, C, H, W], the test images as the network gets them, evenly spaced over the
    set; targets: theirs; layers: by name; areas: for each part of a face its share of the whole image; left_out: why,
    by the name of the target layers that are not shown.
    """

    run: Run
    data: DataSet
    images: Tensor
    targets: Tensor
    layers: Mapping[str, LayerLook]
    areas: Mapping[str, float]
    left_out: Mapping[str, str]


def look_at(run: Run, data_dir: Path, count: int, say: Callable[[str], None]) -> Look:
    """Measure on `count` test images, or as many as there are; `say` is told what is being done.

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
    layers, parts = _with_parts_apart(model)
    with torch.no_grad():
        images = data.inputs(chosen).contiguous(memory_format=torch.channels_last)  # as in tests: faster on CPUs
        model(images[:1])  # then the layers that are run know their maps
    left_out = {name: why for name, layer in layers.items() if (why := _why_not(layer))}
    layers = {name: layer for name, layer in layers.items() if name not in left_out}
    if not layers:
        raise ValueError("it has no target layers of two dimensions")
    say("receptive fields")
    fields = receptive_fields(model, data.input_size, layers)
    say("responses")
    responses = largest_responses(model, images, layers, _TOP)

    def say_layer(name: str) -> None:
        say(f"{layer_title(name)} without its kernels, layer {list(layers).index(name) + 1} of {len(layers)}")

    rises = silencing_rises(model, images, chosen.targets, data.task, layers, say_layer)
    points = reference_points(data)
    masks = {} if points is None else part_masks(points)
    looks = {
        name: LayerLook(
            layer, responses[name], fields[name], rises[name], mass_shares(layer, masks), parts.get(name, 1)
        )
        for name, layer in layers.items()
    }
    areas = {name: float(mask.double().mean()) for name, mask in masks.items()}
    return Look(run, data, images, chosen.targets, looks, areas, left_out)


def _with_parts_apart(model: nn.Module) -> tuple[dict[str, RoiLayer], dict[str, int]]:
    """The model's target layers by name, and of how many parts those are that sum parts.

    In the model, which is changed, each of the latter becomes one whose kernels are all the parts, and their sums.
    """
    layers: dict[str, RoiLayer] = {}
    parts = {}
    for name, layer in roi_layers(model).items():
        layers[name] = layer
        if isinstance(layer, PartsConv2d):
            unrolled = layer.unrolled()
            model.set_submodule(name, unrolled)
            parts[name] = layer.windows
            (layers[name],) = roi_layers(unrolled).values()
    return layers, parts


def _why_not(layer: RoiLayer) -> str:
    """Why a layer cannot be shown, nothing if it can."""
    if layer.map_size is None:
        return "it is not run"
    return "" if layer.num_dims == 2 else f"only maps of two dimensions are, and its have {layer.num_dims}"


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
