"""Pictures of kernels: how many look at each pixel, and at what the most important ones look."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from tkn.data.base import DataSet
from tkn.drawing.figures import ROI_COLOUR, draw_mosaic
from tkn.drawing.mosaic import make_mosaic
from tkn.report.figures.style import PAGE, print_style, wrapped
from tkn.report.kernels.look import Look
from tkn.report.runs.roi_states import layer_title

_COLUMNS = 4


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
        for axis in axes:
            axis.set_axis_off()
        for axis, (name, layer) in zip(axes, look.layers.items(), strict=False):
            kernels = layer.layer.num_kernels
            image = axis.imshow(layer.coverage().numpy(), cmap="magma", vmin=0, vmax=kernels)
            axis.set_title(f"{layer_title(name)}\n{'x'.join(map(str, layer.responses.size))}", fontsize=8)
            bar = figure.colorbar(image, ax=axis, shrink=0.8, ticks=(0, kernels), pad=0.03)
            bar.ax.tick_params(labelsize=7)
        figure.suptitle(wrapped(f"How many ROIs hold each pixel: {title}", columns * cell))
    return figure


def kernels_figure(look: Look, name: str, kernels: Sequence[int], labels: Sequence[str]) -> Figure:
    """A row a kernel of the layer `name`: its window with its ROI, and the images with the largest responses, with the
    ROI's receptive field. `labels`: what stands beside each row.
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
        with torch.no_grad():
            windows = layer.layer.window(layer.responses.size)
        for row, kernel, label in zip(axes, kernels, labels, strict=True):
            mosaic = make_mosaic(windows[kernel : kernel + 1], layer.responses.rois[kernel : kernel + 1])
            draw_mosaic(row[0], mosaic, linewidth=1.2)
            row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
            row[0].set_title("window, ROI", fontsize=7, pad=3)
            for rank, axis in enumerate(row[1:]):
                index, value = (int(layer.responses.images[rank, kernel]), float(layer.responses.values[rank, kernel]))
                _draw_image(axis, look.images[index], layer.fields[kernel])
                axis.set_title(f"{_target_name(look.data, look.targets[index])}: {value:.3g}", fontsize=7, pad=3)
        figure.suptitle(wrapped(layer_title(name)))
    return figure


def _draw_image(axis: Axes, image: Tensor, field: Tensor) -> None:
    """An image [C, H, W] in the network's own range, and a box of it."""
    if image.min() < 0 or image.max() > 1:
        image = (image - image.min()) / (image.max() - image.min())
    gray = len(image) != 3
    pixels = image[0] if gray else image.permute(1, 2, 0)
    axis.imshow(pixels.numpy(), cmap="gray" if gray else None, vmin=0, vmax=1)
    (top, bottom), (left, right) = field.tolist()
    box = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top)
    box.set(facecolor="none", edgecolor=ROI_COLOUR, linewidth=1.2, clip_on=False)
    axis.add_patch(box)
    axis.spines[:].set_visible(False)  # they would hide a box at the border
    axis.set_xticks([])
    axis.set_yticks([])


def _target_name(data: DataSet, target: Tensor) -> str:
    if data.task == "regression":
        return f"{target.flatten()[0]:.3g}"
    return data.classes[int(target)] if data.classes else str(int(target))
