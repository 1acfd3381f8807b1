"""What a `DataSet` of one's own may say."""

from __future__ import annotations

import pytest
import torch

from tkn.data import DataSet, Split


def test_a_regression_has_no_classes() -> None:
    split = Split((torch.zeros(4, 1, 8, 8, dtype=torch.uint8),), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="data=people: classes are for task=classification, this is a regression"):
        DataSet("people", "own: people", "regression", (1, 8, 8), 1, split, split, classes=("age",))
