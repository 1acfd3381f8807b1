"""Figure 2: the two attention functions, and a kernel's windows and map at the start."""

from __future__ import annotations

from math import sqrt

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from tkn.attention import ATTENTION, standardised
from tkn.drawing.figures import COLOURS
from tkn.layers import AttentiveRegularization2d
from tkn.report.figures.style import PAGE, plain_axis, print_style, wrapped

SCALE_UNIT = 0.5
_LINES = {"gaussian": (COLOURS[0], "-"), "cauchy": (COLOURS[1], "--")}
_SIDE = 28


def attention_functions() -> Figure:
    """Both functions over (x - loc) / scale with the ROI's edges, and F_x, F_y and F_att (Eq. 13) at the start."""
    with print_style():
        figure = Figure(figsize=(PAGE, 3.1), layout="constrained")
        grid = GridSpec(2, 4, figure=figure, width_ratios=(2.6, 1, 1, 1))
        _curves(figure.add_subplot(grid[:, 0]))
        axes = [[figure.add_subplot(grid[row, column]) for column in (1, 2, 3)] for row in (0, 1)]
        for name, row in zip(_LINES, axes, strict=True):
            _start(row, name)
        for axis, title in zip(axes[0], ("$F_x$", "$F_y$", r"$F_{att} = F_x \odot F_y$"), strict=True):
            axis.set_title(title)
        bar = figure.colorbar(axes[0][0].images[0], ax=[axis for row in axes for axis in row], aspect=30, pad=0.03)
        bar.set_label("attention")
        figure.suptitle(
            wrapped(f"Attention functions (scale_unit {SCALE_UNIT}), and one kernel's windows at the start")
        )
    return figure


def _curves(axis: Axes) -> None:
    edge = 1 / sqrt(2)
    position = torch.linspace(-2, 2, 401)
    axis.axvspan(-edge, edge, color="0.93", zorder=0)
    for (name, (colour, line)), offset in zip(_LINES.items(), (3, -7), strict=True):
        function = ATTENTION[name]
        axis.plot(position, function(position / SCALE_UNIT), color=colour, linestyle=line, label=name.capitalize())
        at_edge = function(torch.tensor(edge / SCALE_UNIT)).item()
        axis.plot([-edge, edge], [at_edge] * 2, color=colour, linestyle="", marker="o", markersize=4)
        axis.annotate(
            f"{at_edge:.2f}", (edge, at_edge), (6, offset), textcoords="offset points", fontsize=8, color=colour
        )
    for side in (-edge, edge):
        axis.axvline(side, color="0.35", linewidth=0.8, linestyle=":")
    axis.text(0, 0.04, "ROI", ha="center", fontsize=8, color="0.25")
    axis.set_xticks([-2, -edge, 0, edge, 2], ["$-2$", r"$-1/\sqrt{2}$", "0", r"$1/\sqrt{2}$", "2"])
    axis.set_xlim(-2, 2)
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("(x - loc) / scale")
    axis.set_ylabel("attention")
    plain_axis(axis)
    axis.legend(frameon=False, loc="upper right", handlelength=1.4, handletextpad=0.4, borderaxespad=0)


def _start(axes: list[Axes], name: str) -> None:
    """The images of one kernel's F_x, F_y and F_att at loc 0.5 and scale 1, the axes' ends in fractions of the map."""
    layer = AttentiveRegularization2d(1, attention=name, scale_unit=SCALE_UNIT)
    with torch.no_grad():
        f_y, f_x = (
            layer.attention_function(standardised(_SIDE, layer.loc[dim], layer.scale[dim], SCALE_UNIT))[0].numpy()
            for dim in (0, 1)
        )
        attention = layer.window((_SIDE, _SIDE))[0].numpy()
    ones = np.ones(_SIDE)
    for axis, values in zip(axes, (np.outer(ones, f_x), np.outer(f_y, ones), attention), strict=True):
        axis.imshow(values, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0))
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_ylabel(name.capitalize())
