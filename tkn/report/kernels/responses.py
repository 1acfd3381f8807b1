"""The images to which kernels respond most, and where in them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tkn.layers import RoiLayer
from tkn.report.kernels.hooks import seen_passes
from tkn.report.kernels.places import inside, kernel_rois

#: Images at a time: of more the maps of a first layer no longer fit into a processor's cache.
BATCH = 32


@dataclass(frozen=True)
class Responses:
    """Of each of a layer's C kernels the images with the largest responses, the largest first.

    images: int64 [top, C], which image; values: [top, C], the largest number inside the ROI there (minus infinity
    where the ROI is empty); pixels: int64 [top, C, 2], its row and column; rois: int64 [top, C, K, 2, 2], the ROI in
    that image as rectangles, see `kernel_rois`; holding: float64 [C, H, W], the share of all images in which the ROI
    holds the pixel; size: (H, W) of the layer's map.
    """

    images: Tensor
    values: Tensor
    pixels: Tensor
    rois: Tensor
    holding: Tensor
    size: tuple[int, int]


@torch.no_grad()
def largest_responses(
    model: nn.Module, images: Tensor, layers: Mapping[str, RoiLayer], top: int
) -> dict[str, Responses]:
    """Each of the model's layers' responses to the images [N, C, H, W]; `top`: how many images of each kernel, at most.

    A response is the layer's output, convolution times window, at a pixel.
    """
    recorded = {name: _Recorded(layer) for name, layer in layers.items()}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(seen_passes(layer, recorded[name].see))
        for batch in images.split(BATCH):
            model(batch)
    return {name: found.responses(min(top, len(images))) for name, found in recorded.items()}


@dataclass
class _Recorded:
    """Of each kernel and image: the largest response, its pixel (row by row), and the ROI."""

    layer: RoiLayer
    size: tuple[int, int] = (0, 0)
    values: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    rois: list[Tensor] = field(default_factory=list)

    def see(self, input: Tensor, output: Tensor) -> None:
        height, width = output.shape[2:]
        self.size = height, width
        rois = kernel_rois(self.layer, input, self.size)
        seen = output.masked_fill(~inside(self.size, rois), -torch.inf)
        values, places = seen.flatten(2).max(dim=2)
        self.values.append(values)
        self.places.append(places)
        self.rois.append(rois.expand(len(output), *rois.shape[1:]))

    def responses(self, top: int) -> Responses:
        values, images = torch.cat(self.values).topk(top, dim=0)
        kernels = torch.arange(values.shape[1])
        place = torch.cat(self.places)[images, kernels]
        pixels = torch.stack((place // self.size[1], place % self.size[1]), dim=2)
        rois = torch.cat(self.rois)
        held = [inside(self.size, rois[:, kernel]).sum(dim=0) for kernel in kernels.tolist()]
        holding = torch.stack(held).double() / len(rois)
        return Responses(images, values, pixels, rois[images, kernels], holding, self.size)
