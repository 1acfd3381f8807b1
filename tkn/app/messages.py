"""Messages of one line: errors in few words, and names that do not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; the error's kind if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def message(error: BaseException) -> str:
    """An error's whole message in one line; empty if it has none."""
    return " ".join(str(error).split())


def unknown(what: str, name: object, valid: Iterable[str]) -> str:
    """One line: `what` does not know `name`; the nearest valid name, or all of them."""
    name, names = str(name), sorted(valid)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    # "lr" for "recipe.optimizer.lr"
    near = near or [known for known in names if known.split(".")[-1] == name.split(".")[-1]]
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
    return f"unknown {what} {name!r}; {hint}"
