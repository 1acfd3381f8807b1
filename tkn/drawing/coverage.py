"""How many of a layer's kernels look at each pixel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def coverage(rois: Tensor, size: tuple[int, int]) -> NDArray[np.float64]:
    """[H, W]: the share of the kernels whose ROI covers the pixel.

    `rois`: int64 [C, 2, 2], (lo, hi) of rows and columns, half-open; `size`: (H, W).
    """
    covered = np.zeros(size)
    for (top, bottom), (left, right) in rois.tolist():
        covered[top:bottom, left:right] += 1
    return covered / len(rois)
