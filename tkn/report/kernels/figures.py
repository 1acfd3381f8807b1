"""Pictures of kernels: how many look at each pixel, and at what the most important ones look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from tkn.adaptive import AdaptiveConv2d
from tkn.data.base import DataSet
from tkn.drawing.figures import COLOURS, ROI_COLOUR, draw_mosaic
from tkn.drawing.mosaic import make_mosaic
from tkn.report.figures.style import PAGE, print_style, wrapped
from tkn.report.kernels.look import LayerLook, Look
from tkn.report.kernels.places import kernel_windows, static_rois
from tkn.report.runs.roi_states import layer_title

_COLUMNS = 4
#: Of the box of the largest response's receptive field: sky blue, bright beside the ROI's.
_PIXEL_COLOUR = COLOURS[5]


def coverage_figure(look: Look, title: str) -> Figure:
    """For each layer how many of its ROIs hold each pixel of its map."""
    columns = min(_COLUMNS, len(look.layers))
    rows = ceil(len(look.layers) / columns)
    with print_style():
        cell = PAGE / _COLUMNS
        height, width = look.images.shape[2:]
        figure = Figure(
            figsize=(columns * cell, rows * (0.75 * cell * height / width + 0.5) + 0.4), layout="constrained"
        )
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes[len(look.layers) :]:
            axis.set_axis_off()
        for axis, (name, layer) in zip(axes, look.layers.items(), strict=False):
            covered = layer.coverage()
            # To the most that a pixel has: of all kernels it is often a small part.
            most = max(float(covered.max()), 1.0)
            image = axis.imshow(covered.numpy(), cmap="magma", vmin=0, vmax=most)
            axis.set_xticks([])
            axis.set_yticks([])
            size = "x".join(map(str, layer.responses.size))
            axis.set_title(f"{layer_title(name)}\n{layer.kernels} kernels, {size}", fontsize=8)
            bar = figure.colorbar(image, ax=axis, shrink=0.8, ticks=(0, most / 2, most), format="{x:.3g}", pad=0.03)
            bar.ax.tick_params(labelsize=7)
        figure.suptitle(wrapped(f"How many ROIs hold each pixel: {title}", 0.8 * columns * cell))
    return figure


def kernels_figure(look: Look, name: str, kernels: Sequence[int], labels: Sequence[str]) -> Figure:
    """A row a kernel of the layer `name`: its window with its ROI (where ROIs follow the image: in what share of the
    images each pixel is in it), and the images with the largest responses, with the receptive fields of the ROI's
    rectangles and of the largest response. `labels`: what stands beside each row.
    """
    layer = look.layers[name]
    top = len(layer.responses.images)
    with print_style():
        cell = (PAGE - 1.1) / (top + 1)
        height, width = look.images.shape[2:]
        figure = Figure(
            figsize=(PAGE, len(kernels) * (cell * max(height / width, 0.5) + 0.15) + 0.35), layout="constrained"
        )
        axes = figure.subplots(len(kernels), top + 1, squeeze=False)
        for row, kernel, label in zip(axes, kernels, labels, strict=True):
            _draw_place(row[0], layer, kernel)
            row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
            for rank, axis in enumerate(row[1:]):
                index, value = (int(layer.responses.images[rank, kernel]), float(layer.responses.values[rank, kernel]))
                _draw_image(axis, look.images[index])
                for field in layer.roi_fields(rank, kernel):
                    _draw_box(axis, field, ROI_COLOUR, 1.2)
                if value > -torch.inf:
                    _draw_box(axis, layer.pixel_field(rank, kernel), _PIXEL_COLOUR, 0.9)
                axis.set_title(f"{_target_name(look.data, look.targets[index])}: {value:.3g}", fontsize=7, pad=3)
        figure.suptitle(wrapped(layer_title(name)))
    return figure


def _draw_place(axis: Axes, layer: LayerLook, kernel: int) -> None:
    """Where the kernel looks."""
    size = layer.responses.size
    follows = isinstance(layer.layer, AdaptiveConv2d)
    shown = layer.responses.holding if follows else kernel_windows(layer.layer, size)
    rectangles = static_rois(layer.layer, size)[kernel]
    mosaics = [make_mosaic(shown[kernel : kernel + 1], rectangle.unsqueeze(0)) for rectangle in rectangles]
    boxes = [box for mosaic in mosaics for box in mosaic.boxes]
    draw_mosaic(axis, replace(mosaics[0], boxes=[] if follows else boxes), linewidth=1.2)
    axis.set_title("share of images" if follows else "window, ROI", fontsize=7, pad=3)


def _draw_image(axis: Axes, image: Tensor) -> None:
    """An image [C, H, W] in the network's own range."""
    if image.min() < 0 or image.max() > 1:
        image = (image - image.min()) / (image.max() - image.min())
    gray = len(image) != 3
    pixels = image[0] if gray else image.permute(1, 2, 0)
    axis.imshow(pixels.numpy(), cmap="gray" if gray else None, vmin=0, vmax=1)
    axis.spines[:].set_visible(False)  # they would hide a box at the border
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_box(axis: Axes, field: Tensor, colour: str, linewidth: float) -> None:
    (top, bottom), (left, right) = field.tolist()
    box = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top)
    box.set(facecolor="none", edgecolor=colour, linewidth=linewidth, clip_on=False)
    axis.add_patch(box)


def _target_name(data: DataSet, target: Tensor) -> str:
    if data.task == "regression":
        return f"{target.flatten()[0]:.3g}"
    return data.classes[int(target)] if data.classes else str(int(target))
