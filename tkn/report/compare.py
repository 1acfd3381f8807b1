"""Two rows of runs held against each other, where they were computed alike as far as such runs are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt

from scipy.stats import t

from tkn.report.runs.groups import Group, Statistic
from tkn.report.runs.run import Run

LEVEL = 0.95
#: Keys of a recipe that only target layers read.
_OF_TARGETS = ("recipe.attention_lr_factor",)


@dataclass(frozen=True)
class Pair:
    """Rows of two experiments."""

    one: Group
    other: Group

    @property
    def alike(self) -> bool:
        """Whether precision, kind of device and version of torch are the same."""
        return self.one.computed_on == self.other.computed_on

    @property
    def n(self) -> str:
        """The number of runs of each."""
        return f"{len(self.one.runs)}, {len(self.other.runs)}"

    @property
    def conditions(self) -> str:
        """On what they were computed, where that is not the same."""
        return "" if self.alike else f"{conditions(self.one)}, against {conditions(self.other)}"

    def difference(self, name: str) -> tuple[float, float | None]:
        """one - other, see `difference`, of a key of their summaries."""
        one, other = self.one.statistic(name), self.other.statistic(name)
        assert one is not None
        assert other is not None
        return difference(one, other)


def conditions(group: Group) -> str:
    """On what a row was computed."""
    said = group.computed_on
    parts = (said["precision"], said["device"], said["torch"] and f"torch {said['torch']}")
    return " ".join(part for part in parts if part)


def trained_differently(one: Run, other: Run) -> Iterator[str]:
    """What differs between two runs that must not where their networks are compared, in words."""
    ours, theirs = _shared(one), _shared(other)
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            yield f"{key} {ours.get(key)} and {theirs.get(key)}"


def _shared(run: Run) -> dict[str, object]:
    config, summary = run.config or {}, run.result
    recipe = {key: value for key, value in config.items() if key.startswith("recipe.") and key not in _OF_TARGETS}
    stated = {key: value for key, value in recipe.items() if value is not None}
    return {
        **run.computed_on,
        **{key.replace("_", " "): summary.get(key) for key in ("epochs", "tested", "train_images", "test_images")},
        **stated,
    }


def best_pair(ones: Sequence[Group], others: Sequence[Group]) -> Pair | None:
    """Of rows of two experiments those that were computed alike, of these those of the most runs."""
    pairs = [Pair(one, other) for one, other in product(ones, others)]

    def rank(pair: Pair) -> tuple[bool, int, int]:
        counts = len(pair.one.runs), len(pair.other.runs)
        return pair.alike, min(counts), sum(counts)

    return max(pairs, key=rank, default=None)


def half_width(statistic: Statistic) -> float | None:
    """Half of the 95 % interval of a mean by Student's t; None of a single value."""
    if statistic.deviation is None:
        return None
    return float(t.ppf((1 + LEVEL) / 2, statistic.n - 1)) * statistic.deviation / sqrt(statistic.n)


def difference(one: Statistic, other: Statistic) -> tuple[float, float | None]:
    """one - other: of the means, and half of its 95 % interval by Welch's t-test; None if either is a single value."""
    between = one.mean - other.mean
    if one.deviation is None or other.deviation is None:
        return between, None
    parts = [statistic.deviation**2 / statistic.n for statistic in (one, other) if statistic.deviation is not None]
    total = sum(parts)
    if total == 0:
        return between, 0.0
    freedom = total**2 / sum(part**2 / (s.n - 1) for part, s in zip(parts, (one, other), strict=True))
    return between, float(t.ppf((1 + LEVEL) / 2, freedom)) * sqrt(total)


def plus_half(between: float, half: float | None) -> str:
    """A difference of errors, and half of its interval if it has one."""
    return f"{between:+.2f}" + ("" if half is None else f" ± {half:.2f}")
