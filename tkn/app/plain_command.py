"""Commands of plain arguments, without Hydra: how they end, and what their arguments share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from tkn.app.messages import FULL_ERROR, error_line, printable
from tkn.app.signals import Interrupted


def run_plain(name: str, work: Callable[[], int], *expected: type[BaseException]) -> None:
    """Exit with the status that `work` returns, unless that is 0; with 1 if it fails, 130 on Ctrl-C, or the signal's
    status if `work` is `Interrupted`.

    Either with one line on stderr, after the command's `name`; `expected`: see `error_line`.
    """
    try:
        status = work()
    except (KeyboardInterrupt, Interrupted) as stop:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(stop.exit_code if isinstance(stop, Interrupted) else 130)
    except Exception as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        sys.exit(f"{name}: error: {printable(error_line(error, *expected))}")
    if status:
        sys.exit(status)


def positive(text: str) -> int:
    """An argument's type: a whole number, at least 1."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return int(text)
