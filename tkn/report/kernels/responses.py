"""The images to which kernels respond most."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tkn.layers import RoiLayer
from tkn.report.kernels.hooks import Change, hooked_outputs
from tkn.roi import roi_mask

BATCH = 128


@dataclass(frozen=True)
class Responses:
    """Of each kernel of a layer the images with the largest responses, the largest first.

    images: int64 [top, C], which image; values: [top, C], the largest number inside the ROI there (minus infinity
    where the ROI is empty); rois: int64 [C, 2, 2], (lo, hi) of rows and columns; size: (H, W) of the layer's map.
    """

    images: Tensor
    values: Tensor
    rois: Tensor
    size: tuple[int, int]


@torch.no_grad()
def largest_responses(
    model: nn.Module, images: Tensor, layers: Mapping[str, RoiLayer], top: int
) -> dict[str, Responses]:
    """Each of the model's layers' responses to the images [N, C, H, W]; `top`: how many images of each kernel, at most.

    A response is the layer's output, convolution times window, at a pixel.
    """
    largest: dict[str, list[Tensor]] = {name: [] for name in layers}
    rois: dict[str, tuple[Tensor, tuple[int, int]]] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(hooked_outputs(layer, _recorder(layer, name, largest[name], rois)))
        for batch in images.split(BATCH):
            model(batch)
    found = {}
    for name, parts in largest.items():
        values, index = torch.cat(parts).topk(min(top, len(images)), dim=0)
        found[name] = Responses(index, values, *rois[name])
    return found


def _recorder(
    layer: RoiLayer, name: str, largest: list[Tensor], rois: dict[str, tuple[Tensor, tuple[int, int]]]
) -> Change:
    def record(output: Tensor) -> Tensor:
        height, width = output.shape[2:]
        if name not in rois:
            rois[name] = layer.rois((height, width)), (height, width)
        inside = roi_mask((height, width), rois[name][0])
        largest.append(output.masked_fill(~inside, -torch.inf).amax(dim=(2, 3)))
        return output

    return record
