from __future__ import annotations

import numpy as np
import pytest

from tkn.data.partition import Division, bins, joined, mixed_order

LABELS = np.repeat([0, 1, 2], [50, 30, 7])


def _folds(labels: np.ndarray, groups: np.ndarray | None, count: int, seed: int = 0) -> list[np.ndarray]:
    return [Division(None, count, fold, seed).test(labels, groups) for fold in range(count)]


def test_folds_test_every_sample_once_and_hold_the_classes_in_proportion() -> None:
    folds = _folds(LABELS, None, 5)
    assert np.array_equal(sum(fold.astype(int) for fold in folds), np.ones(len(LABELS), int))
    for fold in folds:
        counts = np.bincount(LABELS[fold], minlength=3)
        assert (np.abs(counts - np.bincount(LABELS) / 5) < 1).all()
        assert fold.sum() in (17, 18)


def test_groups_are_joined_by_what_they_share() -> None:
    groups = np.array([0, 0, 1, 1, 2, 3, 4])
    assert joined(groups, np.arange(7)).tolist() == groups.tolist()
    # 2 shares with 1 and 1 with 0; 4 with 3.
    assert joined(groups, np.array([0, 1, 1, 2, 2, 3, 3])).tolist() == [0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.37, 0.5])
def test_a_share_holds_the_classes_in_proportion(share: float) -> None:
    test = Division(share, None, 0, 3).test(LABELS, None)
    assert test.sum() == round(share * len(LABELS))
    assert (np.abs(np.bincount(LABELS[test], minlength=3) - share * np.bincount(LABELS)) < 1.5).all()


def test_the_division_is_of_the_seed() -> None:
    first, again, other = (Division(0.3, None, 0, seed).test(LABELS, None) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    # The same on every machine and for ever: runs are compared by it.
    assert np.flatnonzero(first)[:6].tolist() == GOLDEN


GOLDEN = [4, 9, 14, 15, 18, 21]


@pytest.mark.parametrize("grouped_by", ["share", "folds"])
def test_groups_stay_together(grouped_by: str) -> None:
    random = np.random.RandomState(0)
    groups = np.unique(random.randint(0, 40, 300), return_inverse=True)[1]
    labels = (groups % 3 == 0).astype(np.int64)
    divisions = [Division(0.25, None, 0, 0)] if grouped_by == "share" else [Division(None, 4, k, 0) for k in range(4)]
    tests = [division.test(labels, groups) for division in divisions]
    for test in tests:
        assert not set(groups[test]) & set(groups[~test])
        assert 0.2 < test.mean() < 0.3
        assert abs(labels[test].mean() - labels.mean()) < 0.06
    if grouped_by == "folds":
        assert np.array_equal(sum(test.astype(int) for test in tests), np.ones(300, int))


def test_every_stretch_of_the_order_holds_the_classes_in_proportion() -> None:
    order = mixed_order(LABELS, None, 0)
    assert sorted(order) == list(range(len(LABELS)))
    for part in (order[:29], order[29:58], order[58:]):
        assert (np.abs(np.bincount(LABELS[part], minlength=3) - np.bincount(LABELS) / 3) <= 1.5).all()
    groups = np.array([0, 1, 2] * 4)
    together = groups[mixed_order(np.zeros(12, np.int64), groups, 0)].reshape(3, 4)
    assert (together == together[:, :1]).all()


def test_numbers_are_parted_by_size() -> None:
    values = np.random.RandomState(0).rand(100).astype(np.float32)
    strata = bins(values)
    assert np.bincount(strata).tolist() == [10] * 10
    assert values[strata == 3].max() < values[strata == 4].min()
    assert sorted(bins(values[:3]).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0.0, None, 0, 0), r"data\.test_share=0\.0 must be within \(0, 1\)"),
        ((1.5, None, 0, 0), r"data\.test_share=1\.5 must be"),
        ((float("nan"), None, 0, 0), r"data\.test_share=nan must be"),
        ((None, 1, 0, 0), r"data\.folds=1 must be at least 2"),
        ((0.2, 5, 0, 0), r"data\.folds=5 and data\.test_share=0\.2: give one of them"),
        ((None, 5, 5, 0), r"data\.fold=5 must be 0 to 4, as data\.folds=5"),
        ((None, 5, -1, 0), r"data\.fold=-1 must be 0 to 4"),
        ((None, None, 1, 0), r"data\.fold=1 must be 0 without data\.folds"),
        ((None, None, 0, -1), r"data\.seed=-1 must be"),
    ],
)
def test_impossible_divisions(options: tuple[float | None, int | None, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Division(*options)


def test_fewer_groups_than_folds() -> None:
    with pytest.raises(ValueError, match=r"data\.folds=5: the groups to divide are only 2"):
        Division(None, 5, 0, 0).test(LABELS, (LABELS > 0).astype(np.int64))
