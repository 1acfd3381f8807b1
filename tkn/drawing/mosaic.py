"""A layer's attention maps as one image, a square a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Mosaic:
    """image: attention in [0, 1], NaN between the maps; boxes: every ROI's (left, top, right, bottom) in pixels."""

    image: NDArray[np.float32]
    boxes: list[tuple[int, int, int, int]]


def mosaic_side(kernels: int) -> int:
    """Columns of a mosaic."""
    return ceil(sqrt(kernels))


def make_mosaic(windows: Tensor, rois: Tensor) -> Mosaic:
    """`windows`: [C, H, W]; `rois`: int64 [C, 2, 2], (lo, hi) of rows and columns, half-open."""
    maps = windows.detach().float().cpu().numpy()
    kernels, height, width = maps.shape
    columns = mosaic_side(kernels)
    rows = ceil(kernels / columns)
    gap = 1 + max(height, width) // 14
    image = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan, dtype=np.float32)
    boxes = []
    for kernel, ((top, bottom), (left, right)) in enumerate(rois.tolist()):
        y, x = (kernel // columns) * (height + gap), (kernel % columns) * (width + gap)
        image[y : y + height, x : x + width] = maps[kernel]
        boxes.append((x + left, y + top, x + right, y + bottom))
    return Mosaic(image, boxes)
