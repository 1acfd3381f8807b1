"""Figure 5: TKN6 on MNIST over l2 and beta, and whether larger betas give better trades."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log
from pathlib import Path

import numpy as np

from tkn.report.claims import recorded
from tkn.report.compare import conditions, half_width, plus_half
from tkn.report.runs.groups import Group, Statistic, plus_minus
from tkn.report.tables.formats import markdown_rows
from tkn.report.tables.sheets import Column, millions

#: By beta, the experiments in the order of their l2.
EXPERIMENTS = {beta: [f"figure5_beta{beta}_{name}" for name in ("weak", "middle", "strong")] for beta in (1, 2, 4)}
#: At how many multiply-adds two lines are held against each other.
_PLACES = 41


def lines(results: Path) -> dict[int, list[Group]]:
    """The recorded rows by beta, of one precision, device and version of torch: those of which there are most."""
    found = {beta: [row for name in names for row in recorded(results / name)] for beta, names in EXPERIMENTS.items()}
    rows = [row for groups in found.values() for row in groups]
    if not rows:
        return {}
    counts = {conditions(row): sum(conditions(other) == conditions(row) for other in rows) for row in rows}
    most = max(counts, key=lambda name: counts[name])
    return {beta: [row for row in groups if conditions(row) == most] for beta, groups in found.items()}


@dataclass(frozen=True)
class Trade:
    """A larger beta's error less a smaller one's at equal multiply-adds: the mean over the multiply-adds that both
    lines reach, by seed; none if they reach none together, or have fewer than two points each."""

    smaller: int
    larger: int
    differences: tuple[float, ...]

    @property
    def statistic(self) -> Statistic | None:
        return Statistic.of(self.differences) if self.differences else None


def trades(found: Mapping[int, Sequence[Group]]) -> list[Trade]:
    """Each beta against each smaller one."""
    result = []
    for smaller, larger in combinations(sorted(found), 2):
        seeds = sorted(_seeds(found[smaller]) & _seeds(found[larger]))
        between = [_difference(_points(found[larger], seed), _points(found[smaller], seed)) for seed in seeds]
        result.append(Trade(smaller, larger, tuple(value for value in between if value is not None)))
    return result


def _seeds(groups: Sequence[Group]) -> set[int]:
    return {seed for group in groups for seed in group.seeds}


def _points(groups: Sequence[Group], seed: int) -> list[tuple[float, float]]:
    """(log of the multiply-adds, error) of the runs with this seed, by multiply-adds."""
    runs = [run.result for group in groups for run in group.runs if run.result["seed"] == seed]
    return sorted((log(run["macs_roi"]), run["error"]) for run in runs)


def _difference(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float | None:
    """one - other, of lines of at least two points, interpolated where both are."""
    low, high = max(one[0][0], other[0][0]), min(one[-1][0], other[-1][0])
    if min(len(one), len(other)) < 2 or low >= high:
        return None
    places = np.linspace(low, high, _PLACES)
    first, second = (np.interp(places, *np.array(points).T) for points in (one, other))
    return float(np.mean(first - second))


def verdict(found: Mapping[int, Sequence[Group]]) -> tuple[str, str]:
    """(what came out, the verdict) of "larger betas give better trades"."""
    compared = [trade for trade in trades(found) if trade.statistic is not None]
    if not compared:
        return "", "not tested"
    said, halves = [], []
    for trade in compared:
        statistic = trade.statistic
        assert statistic is not None
        half = half_width(statistic)
        halves.append((statistic.mean, half))
        said.append(f"β = {trade.larger} less {trade.smaller}: {plus_half(statistic.mean, half)} % (n = {statistic.n})")
    all_compared = len(compared) == len(list(combinations(EXPERIMENTS, 2)))
    text = f"error at equal multiply-adds, {'; '.join(said)}"
    if all_compared and all(half is not None and mean + half < 0 for mean, half in halves):
        return text, "reproduced"
    if any(half is not None and mean - half > 0 for mean, half in halves):
        return text, "not reproduced"
    return text, "undecided"


def table(results: Path, picture: Path | None) -> str:
    """Markdown: the picture, if there is one, each point, and the verdict."""
    found = lines(results)
    columns = (
        *(Column("β"), Column("l2"), Column("error (%)"), Column("multiply-adds"), Column("times fewer"), Column("n")),
    )
    rows = []
    for beta, names in EXPERIMENTS.items():
        of_beta = {group.first.folder.parent.name: group for group in found.get(beta, ())}
        for name in names:
            group = of_beta.get(name)
            rows.append((str(beta), *_row(group)) if group else (str(beta), "", f"not run: `{name}`", "", "", ""))
    text, outcome = verdict(found)
    parts = [f"![Error against relative speed-up, a line for each β]({picture})\n"] if picture and found else []
    on = [f"Computed on {conditions(group)}." for groups in found.values() for group in groups][:1]
    words = f"Larger β give better trades: **{outcome}**" + (f"; {text}." if text else ".")
    return "\n".join([*parts, markdown_rows(columns, rows), " ".join([words, *on]), ""])


def _row(group: Group) -> tuple[str, ...]:
    error, macs = group.statistic("error"), group.statistic("macs_roi")
    assert error is not None
    assert macs is not None
    fewer = f"{group.times_fewer:.1f}"
    l2 = f"{group.common['penalty']['l2']:g}"
    return l2, plus_minus(error, "error"), millions(macs.mean, macs.deviation), fewer, str(len(group.runs))
