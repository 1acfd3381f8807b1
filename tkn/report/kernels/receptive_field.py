"""Which pixels of the image a kernel's responses inside its ROI depend on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from tkn.adaptive import AdaptiveConv2d
from tkn.layers import RoiLayer, TargetConvNd
from tkn.locator import Locator
from tkn.report.kernels.hooks import Change, hooked_outputs
from tkn.report.kernels.places import inside, static_rois

_BATCH = 32


def receptive_fields(
    model: nn.Module, input_size: tuple[int, int, int], layers: Mapping[str, RoiLayer]
) -> dict[str, Tensor]:
    """For each of the model's layers (by name) the box of every response of its C kernels on its map (H', W').

    int16 [C, H', W', 2, 2], (lo, hi) of rows and columns: the smallest box of the image (C, H, W) outside of which no
    pixel changes that response, whatever the weights: through kernels, strides, poolings and padding, and through the
    ROIs of the layers before, for what these clip cannot be seen. Of a response that depends on no pixel the box is
    empty. Where ROIs follow the image they are taken as whole maps, and as if the image did not move them.

    Every row and every column of an image in turn is made NaN, which is passed on to whatever is computed from it, also
    by weights of zero and by maxima. ValueError if the network's responses inside ROIs are NaN without that, and for a
    layer that is run several times for an image.
    """
    network, copied = copy.deepcopy((model, dict(layers)))
    # In float64 torch's convolutions go tap by tap; Winograd's and others would spread the NaNs over their tiles.
    network.double().eval()
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    height, width = input_size[1:]
    image = torch.rand(input_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with ExitStack() as stack, torch.no_grad():
        for name, layer in copied.items():
            if isinstance(layer, TargetConvNd):
                layer.engine = "dense"
            if isinstance(layer, AdaptiveConv2d):
                layer.clip, layer.locator = False, _StillLocator()
            stack.enter_context(hooked_outputs(layer, _recorder(layer, seen[name])))
        network(image.unsqueeze(0))
        fields = {name: _nothing_reached(name, copied[name], outputs) for name, outputs in seen.items()}
        for axis, length in enumerate((height, width)):
            for places in torch.arange(length).split(_BATCH):
                network(_marked_images(image, axis, places))
                for name, outputs in seen.items():
                    for place, reached in zip(places.tolist(), outputs.pop(), strict=True):
                        _widen(fields[name][..., axis, :], place, reached)
    return fields


def _nothing_reached(name: str, layer: RoiLayer, outputs: list[Tensor]) -> Tensor:
    """Empty boxes of a layer's responses, int16 [C, H, W, 2, 2]; takes where they are NaN, of an image without any."""
    if len(outputs) != 1:
        raise ValueError(f"layer {name} is run several times for an image: its kernels have no one receptive field")
    nans = outputs.pop()[0]
    if (nans & _roi(layer, nans)).any():
        raise ValueError(f"layer {name} gives NaN: the network has diverged, or divides by zero")
    return torch.zeros((*nans.shape, 2, 2), dtype=torch.int16)


def _widen(fields: Tensor, place: int, reached: Tensor) -> None:
    """Let the intervals [C, H, W, 2] of what is `reached`, bool [C, H, W], hold `place`, which is beyond all others."""
    lo, hi = fields.unbind(-1)
    lo.masked_fill_(reached & (hi == 0), place)
    hi.masked_fill_(reached, place + 1)


def box_around(fields: Tensor) -> Tensor:
    """The smallest box that holds all of the boxes [..., 2, 2] which are not empty: int64 [2, 2], zeros if none is."""
    boxes = fields.reshape(-1, 2, 2).long()
    boxes = boxes[(boxes[..., 1] > boxes[..., 0]).all(dim=1)]
    if not len(boxes):
        return torch.zeros(2, 2, dtype=torch.int64)
    return torch.stack((boxes[..., 0].amin(dim=0), boxes[..., 1].amax(dim=0)), dim=1)


class _StillLocator(Locator):
    """[B, C, H, W] -> of each image no move, and no other scale: both [B, 2]."""

    def __init__(self) -> None:
        super().__init__(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_zeros(len(x), 2), x.new_ones(len(x), 2)


def _marked_images(image: Tensor, axis: int, places: Tensor) -> Tensor:
    """[B, C, H, W]: the image [C, H, W] with one row (axis 0) or column (axis 1) of NaN, at each of the places [B]."""
    images = image.repeat(len(places), 1, 1, 1)
    for marked, place in zip(images, places.tolist(), strict=True):
        marked.select(1 + axis, place).fill_(torch.nan)
    return images


def _recorder(layer: RoiLayer, seen: list[Tensor]) -> Change:
    def record(output: Tensor) -> Tensor:
        seen.append(output.isnan())
        # The layer multiplies by the window's zeros there, which leaves a NaN.
        return torch.where(_roi(layer, output), output, 0.0) if layer.clip else output

    return record


def _roi(layer: RoiLayer, output: Tensor) -> Tensor:
    """bool [C, H, W] of an output [..., C, H, W]: what the static ROIs hold."""
    height, width = output.shape[-2:]
    return inside((height, width), static_rois(layer, (height, width)))
