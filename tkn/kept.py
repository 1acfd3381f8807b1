"""What was made of parameters and is wanted again: kept up to so many bytes, the longest unused given up first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def content(*tensors: Tensor) -> tuple[Hashable, ...]:
    """The numbers of CPU tensors as a key: a change is seen however it was made, also one that torch does not count."""
    return tuple((t.dtype, t.shape, _bytes(t.detach().resolve_neg())) for t in tensors)


def _bytes(x: Tensor) -> bytes:
    # numpy has no bfloat16.
    return (x.contiguous().view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy().tobytes()


class Kept:
    """Values by key, at most `limit` bytes of them; for any number of threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._values: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Made], nbytes: Callable[[Made], int]) -> Made:
        """The value of `key`, made if it is not there. Two threads may both make it; `make` runs without the lock."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]  # type: ignore[return-value]
        value = make()
        self.put(key, value, nbytes(value))
        return value

    def find(self, key: Hashable) -> object:
        """The value of `key`, None if it is not there."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: object, nbytes: int) -> None:
        """Keep `value`, in the place of an older one of this key, and let go of what goes beyond the limit."""
        with self._lock:
            self._bytes += nbytes - self._values.pop(key, (None, 0))[1]
            self._values[key] = value, nbytes
            while self._bytes > self.limit and len(self._values) > 1:
                self._bytes -= self._values.popitem(last=False)[1][1]

    def items(self) -> list[tuple[Hashable, object]]:
        """All keys and values now."""
        with self._lock:
            return [(key, value) for key, (value, _) in self._values.items()]

    def drop(self, key: Hashable) -> None:
        """Let go of the value of `key`, if there is one."""
        with self._lock:
            self._bytes -= self._values.pop(key, (None, 0))[1]

    @property
    def nbytes(self) -> int:
        """What all values together hold."""
        return self._bytes

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._values.clear()
            self._bytes = 0
