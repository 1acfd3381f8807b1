"""Choosing a network's modules and parameters by names and patterns."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from tkn.app.messages import unknown

#: A configuration's one name or pattern, several, or none. Layers of an `nn.Sequential` have numbers.
Names = str | int | list[str | int] | None


def as_patterns(value: Names) -> list[str]:
    """The names and patterns as texts."""
    return [] if value is None else [str(name) for name in (value if isinstance(value, list) else [value])]


def is_chosen(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern (`*`, `?`, `[...]` as in a shell) is for the dotted `name`, or for a module that holds it."""
    parts = name.split(".")
    above = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatchcase(outer, pattern) for pattern in patterns for outer in above)


def require_matches(key: str, patterns: Iterable[str], names: Iterable[str], what: str) -> None:
    """ValueError for the first of `patterns`, the value of `key`, that chooses none of `names` (`what` these are)."""
    names = list(names)
    for pattern in patterns:
        if not any(is_chosen(name, [pattern]) for name in names):
            raise ValueError(unknown(f"{key}: of the network's {what}", pattern, names))
