"""Pictures of one run: its attention maps with the ROIs on them (Fig. 4), its training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import nn

from tkn.app.files import whole_file
from tkn.drawing.mosaic import Mosaic, make_mosaic, mosaic_side
from tkn.layers import roi_layers

#: Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
ROI_COLOUR = "#D55E00"
#: Between the maps of a mosaic.
BETWEEN_COLOUR = "#cfd8dc"


def save_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure whole, in the format of the path's suffix."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def attention_maps(model: nn.Module, map_sizes: Mapping[str, tuple[int, int]], title: str) -> Figure:
    """Every target layer's attention maps F_att (Eq. 13), one square a kernel, its ROI's box drawn on it (Fig. 4).

    `map_sizes`: the (H, W) of each layer's output by the layer's name. ValueError if the model has no target layer.
    """
    layers = {name: layer for name, layer in roi_layers(model).items() if name in map_sizes}
    if not layers:
        raise ValueError("the model has no target layer, so no attention map")
    columns = min(3, len(layers))
    rows = ceil(len(layers) / columns)
    sides = {name: mosaic_side(layer.loc.shape[1]) for name, layer in layers.items()}
    tallest = max(ceil(layer.loc.shape[1] / sides[name]) / sides[name] for name, layer in layers.items())
    figure = Figure(figsize=(3.4 * columns + 0.8, (3.4 * tallest + 0.6) * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    image = None
    for axis, (name, layer) in zip(axes, layers.items(), strict=False):
        mosaic = make_mosaic(layer.window(map_sizes[name]), layer.rois(map_sizes[name]))
        image = draw_mosaic(axis, mosaic, linewidth=1.2 if layer.loc.shape[1] <= 64 else 0.6)
        axis.set_title(f"{name}\n{layer.loc.shape[1]} kernels, {'x'.join(map(str, map_sizes[name]))}", fontsize=9)
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.6, pad=0.02, aspect=30)
    bar.set_label("attention")
    figure.suptitle(title, fontsize=11)
    return figure


def draw_mosaic(axis: Axes, mosaic: Mosaic, linewidth: float) -> AxesImage:
    """The maps in gray with the ROIs' boxes on them; returns the image, for a colour bar."""
    # Large ones are drawn smaller than they are.
    interpolation = "nearest" if mosaic.image.shape[1] <= 256 else "auto"
    image = axis.imshow(mosaic.image, cmap="gray", vmin=0, vmax=1, interpolation=interpolation)
    boxes = [
        Rectangle((left - 0.5, top - 0.5), right - left, bottom - top) for left, top, right, bottom in mosaic.boxes
    ]
    axis.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=ROI_COLOUR, linewidth=linewidth))
    # Room for the lines of boxes at the map's border.
    axis.set_xlim(-1, mosaic.image.shape[1])
    axis.set_ylim(mosaic.image.shape[0], -1)
    axis.set_facecolor(BETWEEN_COLOUR)
    axis.set_xticks([])
    axis.set_yticks([])
    return image


def training_curves(rows: Sequence[Mapping[str, float]], error_name: str, macs_dense: int, title: str) -> Figure:
    """Loss, error and multiply-adds by epoch, and the time of a training step by its multiply-adds.

    `rows`: the history of a run, a mapping of metrics an epoch; `error_name`: "error" (percent), "mse" or "mae".
    """
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    loss, error, macs, step = figure.subplots(1, 4)
    epochs = [row["epoch"] for row in rows]
    for axis, name in ((loss, "loss"), (error, error_name)):
        for colour, column in zip(
            COLOURS, [key for key in rows[0] if key.split("/")[-1].startswith(name)], strict=False
        ):
            axis.plot(epochs, [row[column] for row in rows], color=colour, label=column, marker=".")
        axis.set_ylabel("error (%)" if name == "error" else name)
        axis.set_yscale("log", nonpositive="clip")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.legend(frameon=False, fontsize=8)
    macs.plot(epochs, [row["macs_roi"] / 1e6 for row in rows], color=COLOURS[2], marker=".", label="in the ROIs")
    macs.axhline(macs_dense / 1e6, color="0.4", linestyle="--", linewidth=1, label="dense")
    macs.set_ylabel("multiply-adds (millions)")
    # Parts begin with more than the dense network has.
    most = max(macs_dense, *(row["macs_roi"] for row in rows))
    macs.set_ylim(0, 1.05 * most / 1e6)
    macs.legend(frameon=False, fontsize=8, loc="lower left")
    # The ROIs move within an epoch too: its median step has about the mean of the multiply-adds at its two ends.
    timed = [row for row in rows if "step_seconds" in row]
    ends = [most, *(row["macs_roi"] for row in rows)]
    work = [(ends[rows.index(row)] + row["macs_roi"]) / 2e6 for row in timed]
    step.plot(work, [1e3 * row["step_seconds"] for row in timed], color=COLOURS[0], marker=".", linestyle="none")
    step.set_xlabel("multiply-adds (millions)")
    step.set_ylabel("training step (ms)")
    step.set_xlim(0, 1.05 * most / 1e6)
    step.set_ylim(bottom=0)
    for axis in (loss, error, macs):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in (loss, error, macs, step):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    return figure
