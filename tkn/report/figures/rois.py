"""Figure 4: where a run's kernels looked, layer by layer, as it was at several epochs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import ceil

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from tkn.drawing.figures import draw_mosaic
from tkn.drawing.mosaic import mosaic_side
from tkn.report.figures.style import PAGE, print_style, wrapped
from tkn.report.runs.roi_states import MANY_KERNELS, RoiStates, layer_title

#: A figure has at most so many layers, then it goes on in the next.
_LAYERS = 6
_EPOCHS = (0, 1, 2, 5)
_COLUMNS = 5
#: Shares that are named beside the colours, which tell small ones apart: most pixels are covered by few kernels.
_SHARES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)


def shown_epochs(epochs: Sequence[int], columns: int) -> list[int]:
    """Which of the recorded epochs stand side by side: the start, early ones, when the ROIs move most, and the last."""
    early = [epoch for epoch in _EPOCHS if epoch in epochs and epoch != epochs[-1]]
    if len(early) >= columns:
        early = early[:: ceil(len(early) / (columns - 1))]
    return [*early, epochs[-1]]


def attention_pages(states: RoiStates, title: str) -> list[Figure]:
    """Every target layer, a row a layer and a column an epoch, on as many figures as they need.

    The attention maps and ROIs of its kernels; of layers of many kernels how many ROIs cover each pixel.
    """
    names = list(states.layers)
    pages = [names[start : start + _LAYERS] for start in range(0, len(names), _LAYERS)]
    figures = []
    for number, page in enumerate(pages, 1):
        part = f" ({number} of {len(pages)})" if len(pages) > 1 else ""
        figures.append(_page(states, page, f"{title}{part}"))
    return figures


def _page(states: RoiStates, names: Sequence[str], title: str) -> Figure:
    many = states.kernels > MANY_KERNELS
    epochs = shown_epochs(states.epochs, _COLUMNS)
    with print_style():
        width = PAGE if len(epochs) > 1 else 0.6 * PAGE
        cell = (width - 1.6) / (max(len(epochs), 4) if len(epochs) > 1 else 2)
        heights = [cell * _shape(states, name, many) for name in names]
        layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.03, wspace=0.02, hspace=0.02)
        figure = Figure(figsize=(width, sum(heights) + 0.08 * len(names) + 0.75), layout=layout)
        axes = figure.subplots(len(names), len(epochs), squeeze=False, height_ratios=heights)
        for row, name in zip(axes, names, strict=True):
            loc, _scale, size = states.layers[name]
            kernels = loc.shape[2]
            for axis, epoch in zip(row, epochs, strict=True):
                state = list(states.epochs).index(epoch)
                if many:
                    image = _draw_coverage(axis, states, name, state)
                else:
                    image = draw_mosaic(axis, states.mosaic(name, state), linewidth=0.8)
            lines = [*textwrap.wrap(layer_title(name), 12), f"{kernels} kernels", "x".join(map(str, size))]
            row[0].set_ylabel("\n".join(lines), rotation=0, ha="right", va="center", fontsize=8)
        for axis, epoch in zip(axes[0], epochs, strict=True):
            axis.set_title("start" if epoch == 0 else f"epoch {epoch}")
        if many:
            shares = PercentFormatter(1, decimals=0)
            bar = figure.colorbar(image, ax=list(axes.flat), aspect=30, pad=0.02, ticks=_SHARES, format=shares)
            bar.set_label("kernels whose ROI covers the pixel")
        else:
            bar = figure.colorbar(image, ax=list(axes.flat), shrink=0.5, aspect=30, pad=0.02)
            bar.set_label("attention")
        figure.suptitle(wrapped(title, width))
    return figure


def _shape(states: RoiStates, name: str, many: bool) -> float:
    """A cell's height, by its width."""
    loc, _scale, (height, width) = states.layers[name]
    if many:
        return height / width
    columns = mosaic_side(loc.shape[2])
    return ceil(loc.shape[2] / columns) / columns


def _draw_coverage(axis: Axes, states: RoiStates, name: str, state: int) -> AxesImage:
    axis.set_xticks([])
    axis.set_yticks([])
    return axis.imshow(states.coverage(name, state), cmap="magma", norm=PowerNorm(0.4, 0, 1))
