"""What the tests of runs share."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from tkn.training import run


@pytest.fixture
def empty_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw nothing, for that takes as long as to train; for tests that only compare what was learnt."""
    for name in ("attention_maps", "training_curves"):
        monkeypatch.setattr(run, name, lambda *_: Figure(figsize=(1, 1)))
