"""Where the kernels of a layer look, in each image, whatever kind of target layer it is."""

from __future__ import annotations

import torch
from torch import Tensor

from tkn.adaptive import AdaptiveConv2d
from tkn.layers import RoiLayer
from tkn.roi import roi_mask
from tkn.several import MixtureConv2d


def kernel_count(layer: RoiLayer) -> int:
    """C: the layer's output channels, each of which counts as one kernel."""
    return layer.out_channels if isinstance(layer, MixtureConv2d) else layer.num_kernels


def static_rois(layer: RoiLayer, size: tuple[int, int]) -> Tensor:
    """Rectangles whose union is a kernel's ROI on a map of `size` (H, W): int64 [C, K, 2, 2], (lo, hi) of rows and
    columns. K is 1 but for mixtures. Of an adaptive layer those that no image has moved.
    """
    return layer.rois(size).unflatten(0, (kernel_count(layer), -1))


def kernel_rois(layer: RoiLayer, input: Tensor, size: tuple[int, int]) -> Tensor:
    """Each image's ROIs: int64 [B, C, K, 2, 2]. B is 1 where these are `static_rois`, the same in every image, else the
    images of the layer's `input` [B, Cin, H, W].
    """
    if isinstance(layer, AdaptiveConv2d):
        return layer.image_rois(input).unsqueeze(2)
    return static_rois(layer, size).unsqueeze(0)


def inside(size: tuple[int, int], rois: Tensor) -> Tensor:
    """True in the unions of the rectangles [..., K, 2, 2]: bool [..., H, W]."""
    return roi_mask(size, rois.flatten(0, -3)).unflatten(0, rois.shape[:-2]).any(dim=-3)


@torch.no_grad()
def kernel_windows(layer: RoiLayer, size: tuple[int, int]) -> Tensor:
    """What the layer multiplies each kernel's map by, [C, H, W]; of an adaptive layer its static windows."""
    return layer.mixture(size) if isinstance(layer, MixtureConv2d) else layer.window(size)
