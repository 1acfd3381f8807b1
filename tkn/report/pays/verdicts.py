"""Differences of two rows, and what they come to: Welch's t-test, Holm's correction, verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.stats import ttest_ind_from_stats

from tkn.data.base import is_own
from tkn.report.compare import difference, trained_differently
from tkn.report.pays.design import LEVEL, OURS, RIVALS, PaysSet
from tkn.report.pays.rows import Row
from tkn.report.runs.groups import Group, Statistic
from tkn.report.runs.run import Run, short_source


@dataclass(frozen=True)
class Comparison:
    """One row's metric less another's.

    half: half of the 95 % interval, p: two-sided; None where a row has one seed, or p where there is no spread at all.
    obstacles: why the two do not compare, in words.
    """

    between: float
    half: float | None
    p: float | None
    n: tuple[int, int]
    obstacles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Primary:
    """The primary comparison of a set.

    rival: the arm that ours is held against, None if none was run; missing: the arms of it that were not run;
    adjusted: p by Holm's correction, None where it has no part in that.
    """

    data: PaysSet
    rival: str | None
    comparison: Comparison | None
    missing: tuple[str, ...]
    adjusted: float | None = None

    @property
    def verdict(self) -> str:
        """In words, of ours."""
        if self.missing or self.comparison is None:
            return "not run"
        if self.comparison.obstacles:
            return "no verdict"
        if self.comparison.half is None:
            return "too few seeds"
        if self.adjusted is None or self.adjusted >= LEVEL:
            return "undecided"
        return "ahead" if self.comparison.between < 0 else "behind"


def statistic(group: Group, metric: str) -> Statistic:
    """Of the metric over the row's runs. ValueError, naming one, for runs that lack it."""
    found = group.statistic(metric)
    if found is None:
        raise ValueError(f"{group.first.folder / 'summary.json'} has no {metric}")
    return found


def compare(ours: Group, theirs: Group, metric: str) -> Comparison:
    """Ours less theirs, by Welch's t-test."""
    one, other = statistic(ours, metric), statistic(theirs, metric)
    between, half = difference(one, other)
    return Comparison(between, half, _p(one, other), (one.n, other.n), tuple(_obstacles(ours.first, theirs.first)))


def _p(one: Statistic, other: Statistic) -> float | None:
    if one.deviation is None or other.deviation is None:
        return None
    if one.deviation == other.deviation == 0:
        return 1.0 if one.mean == other.mean else None
    test = ttest_ind_from_stats(*_numbers(one), *_numbers(other), equal_var=False)
    return float(test.pvalue)


def _numbers(statistic: Statistic) -> tuple[float, float | None, int]:
    return statistic.mean, statistic.deviation, statistic.n


def _obstacles(ours: Run, theirs: Run) -> Iterator[str]:
    """What differs between two rows that must not."""
    yield from trained_differently(ours, theirs)
    for run in (ours, theirs):
        if run.soft:
            yield f"the error of {run.folder.parent.name} is without clipping"
        if not (run.whole or is_own(run.result["data_source"])):
            yield f"{run.folder.parent.name} had {short_source(run.result['data_source'])}"


def primary(data: PaysSet, rows: Mapping[str, Row]) -> Primary:
    """The set's primary comparison, not corrected yet; the rival is the one with the lower mean."""
    groups = {arm: rows[arm].group for arm in (OURS, *RIVALS)}
    missing = tuple(arm for arm, group in groups.items() if group is None)
    rivals = {arm: group for arm in RIVALS if (group := groups[arm]) is not None}
    ours = groups[OURS]
    if not rivals:
        return Primary(data, None, None, missing)
    rival = min(rivals, key=lambda arm: statistic(rivals[arm], data.metric).mean)
    if ours is None:
        return Primary(data, rival, None, missing)
    return Primary(data, rival, compare(ours, rivals[rival], data.metric), missing)


def corrected(comparisons: Sequence[Primary]) -> list[Primary]:
    """With p adjusted over all that can be decided: run, comparable, with at least two seeds on either side."""
    able = [one for one in comparisons if _decidable(one)]
    adjusted = dict(zip((one.data.name for one in able), holm([_p_of(one) for one in able]), strict=True))
    return [replace(one, adjusted=adjusted.get(one.data.name)) for one in comparisons]


def _decidable(one: Primary) -> bool:
    return one.comparison is not None and not (one.missing or one.comparison.obstacles) and one.comparison.p is not None


def _p_of(one: Primary) -> float:
    assert one.comparison is not None
    assert one.comparison.p is not None
    return one.comparison.p


def holm(values: Sequence[float]) -> list[float]:
    """Each p, adjusted by Holm's step-down correction for all of them (Holm 1979)."""
    adjusted, least = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = least
    return adjusted
