"""Errors in few words, for messages of one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; the error's kind if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def message(error: BaseException) -> str:
    """An error's whole message in one line; empty if it has none."""
    return " ".join(str(error).split())
