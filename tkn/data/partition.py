"""Which samples are for training and which for testing: a share, or one of several folds, alike in what they hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

Labels = NDArray[np.int64]

#: What the values of a regression are parted into, equally many samples each.
_BINS = 10


def bins(values: NDArray[np.float32]) -> Labels:
    """Numbers [N] as strata: tenths of the samples, by size."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return (ranks * min(_BINS, len(values)) // max(len(values), 1)).astype(np.int64)


def held_out(strata: Labels, groups: Labels | None, shares: list[float], part: int, seed: int) -> NDArray[np.bool_]:
    """Whether each of [N] samples is in the given one of the parts whose shares these are (1 in all).

    Every part holds each stratum in proportion, to within a sample; of `groups`, which stay whole, as near as
    assigning one after the other comes. The same seed gives the same parts everywhere (NumPy guarantees RandomState's
    stream).

    scikit-learn's StratifiedKFold and StratifiedGroupKFold make equal parts alone, and take a second to import.
    """
    random = RandomState(seed)
    if groups is not None:
        return _parts_of_groups(strata, groups, np.array(shares), random)[groups] == part
    # Stratum by stratum, shuffled inside; then as evenly as a line is drawn in pixels.
    order = np.lexsort((random.permutation(len(strata)), strata))
    edges = np.rint(np.cumsum([0, *shares]) * len(strata)).astype(np.int64)
    count, place = edges[part + 1] - edges[part], np.arange(len(strata))
    if len(set(shares)) == 1:
        chosen = place % len(shares) == part
    else:
        chosen = (place + 1) * count // len(strata) > place * count // len(strata)
    result = np.empty(len(strata), np.bool_)
    result[order] = chosen
    return result


def _parts_of_groups(strata: Labels, groups: Labels, shares: NDArray[np.float64], random: RandomState) -> Labels:
    """The part of each group: the largest first, each to where the strata are then spread best."""
    counts = np.zeros((groups.max() + 1, strata.max() + 1))
    np.add.at(counts, (groups, strata), 1)
    # The number of samples counts as much as all strata: few, large groups would follow these alone.
    counts = np.c_[counts / counts.sum(axis=0), counts.sum(axis=1) / counts.sum() * counts.shape[1]]
    filled = np.zeros((len(shares), counts.shape[1]))
    part_of = np.empty(len(counts), np.int64)
    shuffled = random.permutation(len(counts))
    for group in shuffled[np.argsort(-counts[shuffled].max(axis=1), kind="stable")]:
        # The sum of squares of what is filled, by share, is least where all are filled alike.
        added = (((filled + counts[group]) ** 2 - filled**2) / shares[:, None]).sum(axis=1)
        part_of[group] = np.lexsort((filled.sum(axis=1) / shares, added))[0]
        filled[part_of[group]] += counts[group]
    return part_of


def mixed_order(strata: Labels, groups: Labels | None, seed: int) -> Labels:
    """[N]: indices in an order of which every stretch holds the strata in proportion; groups come one after the other.

    The first or last few samples are then as good as any.
    """
    random = RandomState(seed)
    if groups is not None:
        return np.argsort(random.permutation(groups.max() + 1)[groups], kind="stable")
    position = np.empty(len(strata))
    for stratum in np.unique(strata):
        members = random.permutation(np.flatnonzero(strata == stratum))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(position, kind="stable")


def joined(groups: Labels, others: Labels) -> Labels:
    """[N]: groups so large that samples of one group, in either of two partitions, are of one; numbered as `groups`."""
    while True:
        # Every group gets the least number that one of its samples has, in one partition and then in the other.
        before = groups
        for labels in (others, before):
            least = np.full(labels.max() + 1, len(groups))
            np.minimum.at(least, labels, groups)
            groups = least[labels]
        if np.array_equal(groups, before):
            return np.unique(groups, return_inverse=True)[1]


@dataclass(frozen=True)
class Division:
    """What is for testing where the data do not say it, or are to be divided anew: a share, or one of several folds.

    ValueError naming the option (`data.test_share`, `folds`, `fold`, `seed`) that cannot be.
    """

    test_share: float | None
    folds: int | None
    fold: int
    seed: int

    def __post_init__(self) -> None:
        if self.test_share is not None and not 0 < self.test_share < 1:
            raise ValueError(f"data.test_share={self.test_share} must be within (0, 1), a part of the images")
        if self.folds is not None and self.folds < 2:
            raise ValueError(f"data.folds={self.folds} must be at least 2")
        if self.folds is not None and self.test_share is not None:
            raise ValueError(f"data.folds={self.folds} and data.test_share={self.test_share}: give one of them")
        if not 0 <= self.fold < (self.folds or 1):
            wanted = f"0 to {self.folds - 1}, as data.folds={self.folds}" if self.folds else "0 without data.folds"
            raise ValueError(f"data.fold={self.fold} must be {wanted}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data.seed={self.seed} must be in 0 - {2**32 - 1}")

    @property
    def wanted(self) -> bool:
        return self.test_share is not None or self.folds is not None

    @property
    def shares(self) -> list[float]:
        if self.folds is not None:
            return [1 / self.folds] * self.folds
        assert self.test_share is not None
        return [self.test_share, 1 - self.test_share]

    def test(self, strata: Labels, groups: Labels | None, noun: str = "groups") -> NDArray[np.bool_]:
        """Whether each of [N] samples is for testing; see `held_out`.

        ValueError for fewer groups than parts; `noun`: what it calls them.
        """
        present = np.unique(strata, return_inverse=True)[1]
        if groups is not None and groups.max() + 1 < len(self.shares):
            option = f"data.folds={self.folds}" if self.folds is not None else f"data.test_share={self.test_share}"
            raise ValueError(f"{option}: the {noun} to divide are only {groups.max() + 1}")
        return held_out(present, groups, self.shares, self.fold, self.seed)

    def after(self, source: str) -> str:
        """The source of a data set that is divided so (`tkn.data.fold_source` reads it)."""
        return f"{source}, {self}" if self.wanted else source

    def __str__(self) -> str:
        """For messages and for a data set's source."""
        if self.folds is not None:
            return f"fold {self.fold} of {self.folds}, seed {self.seed}"
        return f"test_share {self.test_share:g}, seed {self.seed}"
