"""SIGINT (Ctrl-C) and SIGTERM: leave at once, or at the next point where nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2


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
        """The exit status that shells give for the signal."""
        return 128 + self.number


def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """A handler for a signal that would end the process without a word."""
    raise Interrupted(number)


class Signals:
    """While the block runs, SIGINT and SIGTERM raise `Interrupted` in the main thread.

    With `deferred` the first one is only kept in `received`, for the code that set it to stop where nothing is lost;
    the second one raises. Signals that are ignored stay so. Outside of the main thread, where Python allows no
    handlers, the block changes nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
            self.install()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
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
        # Not print: the signal may have come in the middle of one. Nobody may be reading any more.
        with suppress(OSError):
            os.write(_STDERR, b"stopping after this step (once more to stop at once)\n")
