"""SIGINT (Ctrl-C) and SIGTERM: leave at once, or at the next point where nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The process was told to stop. Not an Exception: nothing that handles errors should go on after it."""

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(number, message)
        self.number = number
        self.message = message

    def __str__(self) -> str:
        return self.message

    @property
    def exit_code(self) -> int:
        """As shells give it."""
        return 128 + self.number


class Signals:
    """While the block runs, SIGINT and SIGTERM raise `Interrupted` in the main thread.

    With `deferred` the first one is only kept in `received`, for the code that set it to stop where nothing is lost;
    the second one raises. Outside of the main thread, where Python allows no handlers, the block changes nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self.install()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals (again: libraries put handlers of their own in place)."""
        for number in self._before:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        first = self.received is None
        self.received = number
        if not (self.deferred and first):
            raise Interrupted(number)
        # Not print: the signal may have come in the middle of one.
        os.write(sys.stderr.fileno(), b"stopping after this step (once more to stop at once)\n")
