"""Figure 4: a run's attention maps and ROIs, layer by layer, as they were at several epochs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import ceil

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tkn.drawing.figures import draw_mosaic
from tkn.drawing.mosaic import mosaic_side
from tkn.report.figures.style import PAGE, print_style, wrapped
from tkn.report.runs.roi_states import MANY_KERNELS, RoiStates, layer_title

#: A figure has at most so many layers, then it goes on in the next.
_LAYERS = 6
_EPOCHS = (0, 1, 2, 5)


def shown_epochs(epochs: Sequence[int], columns: int) -> list[int]:
    """Which of the recorded epochs stand side by side: the start, early ones, when the ROIs move most, and the last."""
    early = [epoch for epoch in _EPOCHS if epoch in epochs and epoch != epochs[-1]]
    if len(early) >= columns:
        early = early[:: ceil(len(early) / (columns - 1))]
    return [*early, epochs[-1]]


def attention_pages(states: RoiStates, title: str) -> list[Figure]:
    """The maps of every target layer, a row a layer and a column an epoch, on as many figures as they need."""
    wide = states.kernels > MANY_KERNELS  # so fewer, larger columns
    chosen = shown_epochs(states.epochs, 3 if wide else 5)
    names = list(states.layers)
    pages = [names[start : start + _LAYERS] for start in range(0, len(names), _LAYERS)]
    figures = []
    for number, page in enumerate(pages, 1):
        part = f" ({number} of {len(pages)})" if len(pages) > 1 else ""
        figures.append(_page(states, page, chosen, f"{title}{part}", wide))
    return figures


def _page(states: RoiStates, names: Sequence[str], epochs: Sequence[int], title: str, wide: bool) -> Figure:
    with print_style():
        width = PAGE if len(epochs) > 1 else 0.6 * PAGE
        cell = (width - 1.6) / (max(len(epochs), 3 if wide else 4) if len(epochs) > 1 else 2)
        shapes = [states.layers[name][0].shape[2] for name in names]
        heights = [cell * ceil(kernels / mosaic_side(kernels)) / mosaic_side(kernels) for kernels in shapes]
        layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.03, wspace=0.02, hspace=0.02)
        figure = Figure(figsize=(width, sum(heights) + 0.08 * len(names) + 0.75), layout=layout)
        axes = figure.subplots(len(names), len(epochs), squeeze=False, height_ratios=heights)
        for row, name in zip(axes, names, strict=True):
            loc, _scale, size = states.layers[name]
            kernels = loc.shape[2]
            for axis, epoch in zip(row, epochs, strict=True):
                mosaic = states.mosaic(name, list(states.epochs).index(epoch))
                image = draw_mosaic(axis, mosaic, linewidth=0.8 if kernels <= MANY_KERNELS else 0.35)
            lines = [*textwrap.wrap(layer_title(name), 12), f"{kernels} kernels", "x".join(map(str, size))]
            row[0].set_ylabel("\n".join(lines), rotation=0, ha="right", va="center", fontsize=8)
        for axis, epoch in zip(axes[0], epochs, strict=True):
            axis.set_title("start" if epoch == 0 else f"epoch {epoch}")
        bar = figure.colorbar(image, ax=list(axes.flat), shrink=0.5, aspect=30, pad=0.02)
        bar.set_label("attention")
        figure.suptitle(wrapped(title, width))
    return figure
