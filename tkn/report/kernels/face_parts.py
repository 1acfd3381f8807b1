"""Which parts of a face kernels look at."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tkn.data.base import DataSet
from tkn.data.face import WarpFaces
from tkn.layers import RoiLayer
from tkn.report.kernels.places import inside, kernel_windows, static_rois

#: The outlines by landmarks of iBUG-68, and of the same without the inner mouth's corners: (first, after the last).
PARTS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "brows": ((17, 22), (22, 27)),
    "eyes": ((36, 42), (42, 48)),
    "nose": ((27, 36),),
    "mouth": ((48, 60),),
}
_NUMBERED = (66, 68)
#: Pixels along a side of the face on which masses are summed.
_SIDE = 192


def reference_points(data: DataSet) -> Tensor | None:
    """[n, 2] (x, y) in [0, 1] of the network's input, of the landmarks that every face of `data` is warped to.

    None if `data` are no warped faces, or their landmarks are not numbered as `PARTS` wants them.
    """
    if not isinstance(data.to_input, WarpFaces):
        return None
    points = data.to_input.warp.face.points
    return points if len(points) in _NUMBERED else None


def part_masks(points: Tensor) -> dict[str, Tensor]:
    """bool [S, S] for each part: the pixels within the convex hulls of its landmarks."""
    from scipy.spatial import Delaunay  # here, for it takes a second to import

    centres = (np.arange(_SIDE) + 0.5) / _SIDE
    pixels = np.stack(np.meshgrid(centres, centres), axis=-1)
    masks = {}
    for name, outlines in PARTS.items():
        hulls = [Delaunay(points[first:last].double().numpy()) for first, last in outlines]
        masks[name] = torch.from_numpy(np.any([hull.find_simplex(pixels) >= 0 for hull in hulls], axis=0))
    return masks


@torch.no_grad()
def mass_shares(layer: RoiLayer, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each part [C]: the share of the mass of a kernel's window, within its ROI, that is inside the part.

    Of an adaptive layer those of its static windows.
    """
    size = (_SIDE, _SIDE)
    window = kernel_windows(layer, size).double() * inside(size, static_rois(layer, size))
    whole = window.sum(dim=(1, 2))
    return {name: (window * mask).sum(dim=(1, 2)) / whole for name, mask in masks.items()}
