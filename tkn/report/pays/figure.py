"""The page's figure: error against multiply-adds and against measured time, two panels a set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tkn.drawing.figures import COLOURS, save_figure
from tkn.report.compare import half_width
from tkn.report.figures.style import PAGE, plain_axis, print_style
from tkn.report.pays.design import SHARE
from tkn.report.pays.study import SetResults
from tkn.report.pays.verdicts import statistic
from tkn.report.runs.groups import Group

_BATCH = 128
_DPI = 220
#: Colour, marker and whether it is filled, of each arm: told apart in black and white too.
_STYLES: Mapping[str, tuple[str, str, bool]] = {
    "dense": ("black", "*", True),
    "thin": (COLOURS[0], "s", True),
    "pruned": (COLOURS[5], "^", True),
    "targeted": (COLOURS[1], "o", True),
    "converted": (COLOURS[4], "D", True),
    "centred": ("0.35", "P", False),
    "random": ("0.35", "X", False),
}
#: Sideways, in parts of the dense network's multiply-adds: all but the dense networks have as many.
_APART = 0.045


def draw_figure(sets: Sequence[SetResults]) -> Figure:
    """Two panels for each set that was run; at least one of them must have been."""
    run = [found for found in sets if found.groups]
    columns = min(2, len(run))
    rows = ceil(len(run) / columns)
    with print_style():
        figure = Figure(figsize=(PAGE if columns > 1 else 0.6 * PAGE, 1.9 * rows + 0.6), layout="constrained")
        parts = figure.subfigures(rows, columns, squeeze=False)
        for part, found in zip(parts.flat, run, strict=False):
            cost, time = part.subplots(1, 2, sharey=True)
            part.suptitle(found.data.title, fontsize=9)
            _draw_cost(cost, found)
            _draw_time(time, found)
            cost.set_ylabel(found.data.unit)
        figure.legend(handles=_handles(run), loc="outside lower center", ncols=len(_STYLES), frameon=False)
    return figure


def _draw_cost(axis: Axes, found: SetResults) -> None:
    """Against the share of the dense network's multiply-adds; those of as many stand beside each other."""
    assert found.whole is not None
    others = [arm for arm in _STYLES if arm != "dense"]
    for arm, group in found.groups.items():
        macs = statistic(group, "macs_roi").mean / found.whole
        aside = 0 if arm == "dense" else (others.index(arm) - (len(others) - 1) / 2) * _APART
        _point(axis, arm, group, found, macs + aside)
    axis.set_xlim(0, 1.12)
    axis.set_xticks([0, SHARE, 1], ["0", "1/3", "1"])
    axis.set_xlabel("multiply-adds / dense")
    axis.margins(y=0.12)
    plain_axis(axis)


def _draw_time(axis: Axes, found: SetResults) -> None:
    """Against the milliseconds of a batch, where they were measured."""
    axis.set_xlabel(f"ms, {_BATCH} images")
    plain_axis(axis)
    drawn = False
    for arm, group in found.groups.items():
        timed = None if found.timings is None else found.timings.of(arm, group, _BATCH)
        if timed is not None:
            low, middle, high = (1000 * value for value in (timed.q1, timed.median, timed.q3))
            _point(axis, arm, group, found, middle, (middle - low, high - middle))
            drawn = True
    if not drawn:
        axis.set_xticks([])
        axis.text(0.5, 0.5, "not timed", ha="center", va="center", transform=axis.transAxes, color="0.4")
        return
    axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.autoscale_view()
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def _point(
    axis: Axes, arm: str, group: Group, found: SetResults, x: float, quartiles: tuple[float, float] = (0, 0)
) -> None:
    """A row's mean with its 95 % interval."""
    error = statistic(group, found.data.metric)
    axis.errorbar(
        x,
        error.mean,
        xerr=[[quartiles[0]], [quartiles[1]]],
        yerr=half_width(error),
        linewidth=0.9,
        capsize=2,
        **_style(arm),
    )


def _style(arm: str) -> dict[str, Any]:
    colour, marker, filled = _STYLES[arm]
    return {
        "color": colour,
        "marker": marker,
        "markersize": 9 if marker == "*" else 5,
        "markerfacecolor": colour if filled else "white",
        "linestyle": "",
    }


def _handles(run: Sequence[SetResults]) -> list[Line2D]:
    shown = [arm for arm in _STYLES if any(arm in found.groups for found in run)]
    return [Line2D([], [], label=arm, **_style(arm)) for arm in shown]


def save_picture(figure: Figure, path: Path) -> None:
    """As a picture for a page, the same bytes for the same figure."""
    with print_style():
        save_figure(figure, path, _DPI)
