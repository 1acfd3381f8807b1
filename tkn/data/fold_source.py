"""What a `DataSet.source` says of folds, read back: which one it is, and of what."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: How `tkn.data.partition.Division` ends a source.
_FOLD = re.compile(r", fold (\d+) of (\d+), (seed \d+)$")
#: What differs between folds in how `tkn.data.own.describe_own` begins it.
_PARTS = re.compile(r"([\d,]+) (\S+) to train and ([\d,]+) to test")


@dataclass(frozen=True)
class Fold:
    """One of `count` folds, from 0; divided: the source of all of them, the same for each."""

    number: int
    count: int
    divided: str


def read_fold(source: str) -> Fold | None:
    """The fold that a source tells of; None if it tells of none."""
    match = _FOLD.search(source)
    if match is None:
        return None
    number, count = int(match[1]), int(match[2])
    return Fold(number, count, f"{_PARTS.sub(_sum, source[: match.start()])}, {count} folds, {match[3]}")


def _sum(match: re.Match[str]) -> str:
    train, noun, test = match.groups()
    return f"{int(train.replace(',', '')) + int(test.replace(',', '')):,} {noun}"
