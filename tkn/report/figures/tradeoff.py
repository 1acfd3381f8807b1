"""Figure 5: error against how many times less the targeted network costs, by l2 and beta."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import ceil, inf

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, TextArea
from matplotlib.path import Path
from matplotlib.transforms import Bbox

from tkn.drawing.figures import COLOURS
from tkn.report.figures.style import PAGE, plain_axis, print_style, wrapped
from tkn.report.figures.tradeoff_points import Panel, Point, pareto_front
from tkn.report.runs.run import short_source

#: In place of a beta, where a budget decides.
_BUDGET = inf
#: What a colour and marker stand for: an attention and its beta, or (None) whatever its beta.
_Kind = tuple[str, float | None]
_Styles = dict[_Kind, tuple[str, str]]

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<")
_ERRORS = {"error": "error (%)", "mse": "mean squared error"}
_SIZE = 6
#: Where a point's label may stand, in points: the first place that is free.
_PLACES = [(x, y) for reach in (8, 14, 22) for x in (reach, -reach) for y in (reach - 2, 2 - reach)]
_PLACES += [(0, y) for y in (13, -13, 24, -24)]
#: With more pairs of attention and beta, as of a random search, beta is written at the points.
_KINDS = 6
#: A figure has at most so many panels, then it goes on in the next.
_PANELS = 4
#: A panel has a front where each of its points is of several seeds, or where it has so many.
_FRONT = 6


def tradeoff_pages(panels: Sequence[Panel], title: str, xlabel: str) -> list[Figure]:
    """`tradeoff_figure` on as many figures as the panels need."""
    pages = [panels[start : start + _PANELS] for start in range(0, len(panels), _PANELS)]
    parts = [f" ({number} of {len(pages)})" if len(pages) > 1 else "" for number in range(1, len(pages) + 1)]
    return [tradeoff_figure(page, f"{title}{part}", xlabel) for page, part in zip(pages, parts, strict=True)]


def tradeoff_figure(panels: Sequence[Panel], title: str, xlabel: str) -> Figure:
    """A plot for each panel: a marker and colour for each attention and beta, l2 written at the points if it differs.

    Of many betas, as of a random search: a marker and colour for each attention, l2 and beta at the points. Hollow
    markers are what the paper reports of the same rows.
    """
    pairs = sorted({_pair(point) for panel in panels for point in panel.targeted})
    kinds: list[_Kind] = list(pairs) if len(pairs) <= _KINDS else [(name, None) for name in sorted(dict(pairs))]
    styles = {kind: (COLOURS[i % len(COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, kind in enumerate(kinds)}
    alike = _only_l2(panels, styles)
    columns = min(2, len(panels))
    rows = ceil(len(panels) / columns)
    with print_style():
        width = PAGE if columns > 1 else 0.72 * PAGE
        figure = Figure(figsize=(width, 3.1 * rows + 0.9), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        figure.suptitle(wrapped(title, width))
        figure.legend(
            handles=_handles(panels, styles, alike),
            loc="outside lower center",
            ncols=3 if columns > 1 else 2,
            frameon=False,
        )
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel, styles)
            axis.set_xlabel(xlabel)
            axis.set_ylabel(_ERRORS[panel.error_name])
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        if alike is None:
            # The labels' places are chosen in pixels, which the layout decides.
            figure.draw_without_rendering()
            for axis, panel in zip(axes, panels, strict=False):
                _label(axis, panel, styles)
    return figure


def _pair(point: Point) -> tuple[str, float]:
    run = point.group.first
    return run.windows, _BUDGET if "asked" in run.shrunk_by else run.shrunk_by.get("beta", 0)


def _l2(point: Point) -> float:
    value: float = point.group.first.shrunk_by.get("l2", 0)
    return value


def _only_l2(panels: Sequence[Panel], styles: _Styles) -> float | None:
    """The l2 that all points have, None if it has to be written at them."""
    points = [point for panel in panels for point in panel.targeted]
    if any(_pair(point)[1] == _BUDGET for point in points):
        return None
    values = {_l2(point) for point in points}
    return values.pop() if len(values) == 1 and all(beta is not None for _, beta in styles) else None


def _has_front(panel: Panel) -> bool:
    return len(panel.targeted) >= _FRONT or all(point.error.n > 1 for point in panel.targeted)


def _style(point: Point, styles: _Styles) -> tuple[str, str]:
    name, beta = _pair(point)
    return styles[(name, beta) if (name, beta) in styles else (name, None)]


def _handles(panels: Sequence[Panel], styles: _Styles, alike: float | None) -> list[Line2D]:
    handles = []
    for (name, beta), (colour, marker) in styles.items():
        label = name if beta is None else f"{name}, budget" if beta == _BUDGET else f"{name}, β = {beta:g}"
        handles.append(Line2D([], [], linestyle="", color=colour, marker=marker, markersize=_SIZE, label=label))
    if any(panel.dense for panel in panels):
        handles.append(Line2D([], [], linestyle="", color="black", marker="*", markersize=10, label="dense network"))
    if any(point.published for panel in panels for point in panel.targeted):
        handles.append(
            Line2D(
                [], [], linestyle="", color="0.3", marker="o", markersize=_SIZE, mfc="none", label="hollow: the paper"
            )
        )
    if any(map(_has_front, panels)):
        handles.append(Line2D([], [], color="0.45", linewidth=1, label="Pareto front"))
    if alike is not None:
        written = f"l2 = {alike:g}"
    else:
        written = f"numbers: {'l2' if all(beta is not None for _, beta in styles) else 'l2, β'}"
    if any(_pair(point)[1] == _BUDGET for panel in panels for point in panel.targeted):
        written += ", or the budget's share"
    handles.append(Line2D([], [], linestyle="", label=written))
    return handles


def _text(point: Point, styles: _Styles) -> str:
    """What is written at a point."""
    pair = _pair(point)
    if pair[1] == _BUDGET:
        return f"{point.group.first.shrunk_by['asked'] / point.group.common['macs_dense']:.2g}"
    l2 = _l2(point)
    return f"{l2:.2g}" if pair in styles else f"{l2:.2g}, {pair[1]:.2g}"


def _draw(axis: Axes, panel: Panel, styles: _Styles) -> None:
    for point in panel.targeted:
        colour, marker = _style(point, styles)
        _errorbar(axis, point, colour, marker, _SIZE)
        _published(axis, point, colour, marker, _SIZE)
    for point in panel.dense:
        _errorbar(axis, point, "black", "*", 10)
        _published(axis, point, "black", "*", 10)
    if _has_front(panel):
        axis.plot(*zip(*_front(panel), strict=True), color="0.45", linewidth=1, zorder=1)
    axis.axvline(1, color="0.6", linewidth=0.8, linestyle=":", zorder=0)  # the dense network's cost
    # Room for the labels at the outer points.
    axis.margins(0.16, 0.2)
    axis.autoscale_view()
    axis.set_ylim(bottom=max(0, axis.get_ylim()[0]))
    heading = f"{panel.base_model} on {panel.data}"
    if panel.source != "full":
        heading += f" ({short_source(panel.source)})"
    axis.set_title("\n".join(textwrap.wrap(heading, 38)))
    plain_axis(axis)


def _front(panel: Panel) -> list[tuple[float, float]]:
    return pareto_front((point.gain.mean, point.error.mean) for point in (*panel.dense, *panel.targeted))


def _errorbar(axis: Axes, point: Point, colour: str, marker: str, size: float) -> None:
    axis.errorbar(
        point.gain.mean,
        point.error.mean,
        xerr=point.gain.deviation,
        yerr=point.error.deviation,
        color=colour,
        marker=marker,
        markersize=size,
        linewidth=0.9,
        capsize=2,
        linestyle="",
    )


def _published(axis: Axes, point: Point, colour: str, marker: str, size: float) -> None:
    if point.published is not None:
        axis.plot(*point.published, color=colour, marker=marker, markersize=size, mfc="none", linestyle="", zorder=3)


def _label(axis: Axes, panel: Panel, styles: _Styles) -> None:
    """Write at each point, where nothing else is."""
    figure = axis.get_figure(root=True)
    assert isinstance(figure, Figure)
    pixels = figure.dpi / 72
    everything = [*panel.targeted, *panel.dense]
    taken = [box for point in everything for box in _extents(axis, point, (_SIZE / 2 + 1) * pixels)]
    line = Path(axis.transData.transform(_front(panel) if _has_front(panel) else np.empty((0, 2))))
    for point in panel.targeted:
        texts = [
            AnnotationBbox(
                TextArea(_text(point, styles), textprops={"fontsize": 8, "color": _style(point, styles)[0]}),
                (point.gain.mean, point.error.mean),
                xybox=place,
                boxcoords="offset points",
                box_alignment=(_alignment(place[0]), 0.5),
                frameon=False,
                pad=0,
            )
            for place in _PLACES
        ]
        boxes = []
        for text in texts:
            axis.add_artist(text)
            boxes.append(text.get_window_extent())
            text.remove()
        inside = axis.get_window_extent()
        costs = [
            sum(box.overlaps(other) for other in taken)
            + line.intersects_bbox(box, filled=False)
            + 2 * (not _within(box, inside))
            for box in boxes
        ]
        best = costs.index(min(costs))
        axis.add_artist(texts[best])
        taken.append(boxes[best])


def _alignment(offset: float) -> float:
    return 0.5 if offset == 0 else 0.0 if offset > 0 else 1.0


def _extents(axis: Axes, point: Point, radius: float) -> list[Bbox]:
    """The boxes of a point's marker and of its two error bars, in pixels."""
    gain, error = point.gain, point.error
    x, y = axis.transData.transform((gain.mean, error.mean))
    ends = (gain.mean + (gain.deviation or 0), error.mean + (error.deviation or 0))
    right, top = axis.transData.transform(ends)
    return [
        Bbox.from_extents(x - radius, y - radius, x + radius, y + radius),
        Bbox.from_extents(x - 2, 2 * y - top, x + 2, top),
        Bbox.from_extents(2 * x - right, y - 2, right, y + 2),
    ]


def _within(box: Bbox, outer: Bbox) -> bool:
    return outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1
