"""The GPU's kernels on the GPU; where there is none by Triton's interpreter, in the place of the CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tkn.backends.cuda import backend
from tkn.ops import engines, sticky
from tkn.plan import place

pytest.importorskip("triton", reason="torch without CUDA comes without Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _gpu_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE.type == "cpu":
        monkeypatch.setitem(place.ARRANGED, "cpu", place.ARRANGED["cuda"])
        monkeypatch.setitem(place._TYPES, "cpu", place._TYPES["cuda"])
        monkeypatch.setitem(engines._MODULES, "cpu", backend.__name__)
        monkeypatch.setattr(backend, "available", lambda *_, **__: True)
    sticky.forget()
    yield
    sticky.forget()
    backend.forget()


@pytest.fixture
def device() -> torch.device:
    """Where the tests compute."""
    return DEVICE
