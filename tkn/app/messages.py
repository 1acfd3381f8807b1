"""Messages of one line: errors in few words, and names that do not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

#: The environment's variable that, set to 1, shows an error's traceback: Hydra's own.
FULL_ERROR = "HYDRA_FULL_ERROR"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; the error's kind if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def message(error: BaseException) -> str:
    """An error's whole message in one line; empty if it has none."""
    return " ".join(str(error).split())


def printable(text: str) -> str:
    """The text with what a terminal would act on, or can't show, as escapes: names of received files hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def error_line(error: BaseException, *expected: type[BaseException]) -> str:
    """An error's message in one line; names of kinds that are not `expected` are kept, with the way to see more."""
    text = message(error) or type(error).__name__
    if isinstance(error, (ValueError, OSError, *expected)):
        return text
    return f"{type(error).__name__}: {text} ({FULL_ERROR}=1 shows the traceback)"


def unknown(what: str, name: object, valid: Iterable[str]) -> str:
    """One line: `what` does not know `name`; the nearest valid name, or all of them."""
    name, names = str(name), sorted(valid)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    # "lr" for "recipe.optimizer.lr"
    near = near or [known for known in names if known.split(".")[-1] == name.split(".")[-1]]
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
    return f"unknown {what} {name!r}; {hint}"
