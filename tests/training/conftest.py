"""Runs of these tests write empty pictures: to draw them takes as long as to train."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from tkn.training import run


@pytest.fixture(autouse=True)
def _empty_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of module-wide fixtures, and of the command in processes of its own, draw them."""
    for name in ("attention_maps", "training_curves"):
        monkeypatch.setattr(run, name, lambda *_: Figure(figsize=(1, 1)))
