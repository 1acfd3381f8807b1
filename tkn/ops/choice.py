"""engine="auto": the faster engine by estimate, or by what `tkn.tune` measured. Nothing is timed here."""

from __future__ import annotations

from tkn.ops.engines import Backend
from tkn.work import Work


def is_faster(backend: Backend, work: Work) -> bool:
    """Whether the backend is estimated to be faster than torch, densely."""
    return backend.seconds("roi", work) < backend.seconds("dense", work)
