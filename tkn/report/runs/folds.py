"""Runs that differ only in the fold and the seed as one cross-validated row, and which rows are held together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tkn.report.runs.groups import Group, Statistic, groups_of
from tkn.report.runs.run import Run


@dataclass(frozen=True)
class CrossValidated:
    """Counted runs on the folds of one division, which differ only in the fold and the seed.

    whole: all of them; folds: those of each fold that was run, by its number; count: how many folds there are;
    data: the source of all of them.
    """

    whole: Group
    folds: Mapping[int, Group]
    count: int
    data: str

    @property
    def label(self) -> str:
        return self.whole.label

    @property
    def missing(self) -> list[int]:
        """The folds that were not run: without them there is no error over all."""
        return [number for number in range(self.count) if number not in self.folds]

    def values(self, key: str) -> dict[int, float]:
        """Of each fold that was run the mean over its seeds; none of folds with a run that lacks the key."""
        statistics = {number: group.statistic(key) for number, group in self.folds.items()}
        return {number: found.mean for number, found in statistics.items() if found is not None}

    def pooled(self, key: str) -> float | None:
        """Over the samples of all folds, each of which is tested once: the mean weighted by `test_images`.

        None where a fold is missing, or a run says not how many images it tested.
        """
        values, weights = self.values(key), self.values("test_images")
        if not len(values) == len(weights) == self.count:
            return None
        return fmean(values.values(), [weights[number] for number in values])

    def over_folds(self, key: str) -> Statistic | None:
        """Of the folds' values, unweighted; None where a fold is missing."""
        values = self.values(key)
        return Statistic.of(list(values.values())) if len(values) == self.count else None


@dataclass(frozen=True)
class FoldPair:
    """A targeted row and the dense one of the same base network, data and division."""

    targeted: CrossValidated
    dense: CrossValidated

    @property
    def missing(self) -> list[int]:
        """The folds that one of them lacks."""
        return sorted({*self.targeted.missing, *self.dense.missing})

    @property
    def common(self) -> list[int]:
        """The folds that both have."""
        return [number for number in self.targeted.folds if number in self.dense.folds]

    def differences(self, key: str) -> dict[int, float]:
        """targeted - dense, fold by fold, of those that both have."""
        ours, theirs = self.targeted.values(key), self.dense.values(key)
        return {number: ours[number] - theirs[number] for number in self.common}

    def statistic(self, key: str) -> Statistic | None:
        """Of the differences; None where a fold is missing."""
        return None if self.missing else Statistic.of(list(self.differences(key).values()))


def cross_validated(runs: Iterable[Run]) -> list[CrossValidated]:
    """The counted runs on folds as rows, in a fixed order of their settings."""
    chosen = [run for run in runs if run.state == "finished" and run.fold is not None]
    return [_row(group) for group in groups_of(chosen, over_folds=True)]


def _row(group: Group) -> CrossValidated:
    members: dict[int, list[Run]] = {}
    for run in group.runs:
        assert run.fold is not None
        members.setdefault(run.fold.number, []).append(run)
    folds = {number: Group(group.label, tuple(members[number])) for number in sorted(members)}
    fold = group.first.fold
    assert fold is not None
    return CrossValidated(group, folds, fold.count, fold.divided)


def fold_pairs(rows: Sequence[CrossValidated]) -> Iterator[FoldPair]:
    """Each targeted row with each whole dense one that shares base network, data, its options and division."""
    for targeted in rows:
        for dense in rows:
            whole_dense = not (dense.whole.targeted or dense.whole.common.get("narrowed"))
            if targeted.whole.targeted and whole_dense and _divided(targeted) == _divided(dense):
                yield FoldPair(targeted, dense)


def _divided(row: CrossValidated) -> tuple[object, ...]:
    identity = row.whole.first.identity(over_folds=True)
    options = {key: str(value) for key, value in identity.items() if key.startswith("data.") and value is not None}
    return row.whole.base_model, row.whole.common["data"], row.data, options
