"""Error against cost, as numbers: the points of Figure 5 and which of them no other beats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tkn.report.runs.groups import Group, Section, Statistic


@dataclass(frozen=True)
class Point:
    """A row in the plane: `gain` is how many times less it costs than the dense network, `error` its own.

    published: (gain, error) that the paper reports of the row, None where it does not.
    """

    group: Group
    gain: Statistic
    error: Statistic
    published: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """The rows of one data set and base network, of one source: only they compare.

    dense: the dense network's rows; targeted: all others. `error_name`: "error" in percent, or "mse".
    """

    data: str
    base_model: str
    source: str
    error_name: str
    dense: tuple[Point, ...]
    targeted: tuple[Point, ...]


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (gain, error) pairs that no other matches or beats in both, by rising gain; of equals one."""
    front: list[tuple[float, float]] = []
    for gain, error in sorted(set(points), key=lambda point: (-point[0], point[1])):
        if not front or error < front[-1][1]:
            front.append((gain, error))
    return front[::-1]


def panels(
    sections: Iterable[Section],
    gain: Callable[[Group], Sequence[float]],
    published: Callable[[Group], tuple[float, float] | None] = lambda _: None,
) -> list[Panel]:
    """A panel for each data set, base network and source that has a targeted row.

    `gain`: how many times less than the dense network each run of a row costs; rows without any are left out, and so
    are those of soft windows, whose error and cost are not of one computation. `published`: what the paper has.
    """
    found = []
    for section in sections:
        keys = dict.fromkeys((group.common["data"], group.base_model) for group in section.groups)
        for data, base_model in keys:
            groups = [g for g in section.groups if (g.common["data"], g.base_model) == (data, base_model)]
            points = [
                _point(group, gain(group), published(group)) for group in groups if gain(group) and not group.first.soft
            ]
            targeted = tuple(point for point in points if point.group.targeted)
            if targeted:
                dense = tuple(point for point in points if not point.group.targeted)
                name = targeted[0].group.errors[0]
                found.append(Panel(data, base_model, section.source, name, dense, targeted))
    return found


def _point(group: Group, gains: Sequence[float], published: tuple[float, float] | None) -> Point:
    error = group.statistic(group.errors[0])
    assert error is not None
    return Point(group, Statistic.of(gains), error, published)


def operations_gain(group: Group) -> list[float]:
    """Times fewer multiply-adds than the dense network, of each run."""
    return [run.result["macs_dense"] / run.result["macs_roi"] for run in group.runs]


def published_operations(group: Group) -> tuple[float, float] | None:
    """Times fewer multiply-adds than the dense network, and the error, of the paper's row that the runs stand for."""
    paper = group.paper
    return None if paper is None else (group.common["macs_dense"] / (1e6 * paper.macs), paper.errors[group.errors[0]])
