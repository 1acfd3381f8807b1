"""ROIs that do not learn: a trained network's, where they are or elsewhere, which tells what learning them is worth."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor, nn

from tkn.app.messages import unknown
from tkn.decay import attention_parameters
from tkn.layers import RoiLayer, require_rectangles, roi_layers
from tkn.macs import count_macs
from tkn.roi import least_scale

#: Where ROIs are put: where they were learned, in the middle of the map, or anywhere on it.
PLACES = ("learned", "centred", "random")


@torch.no_grad()
def fix_rois_(
    model: nn.Module,
    rois: Mapping[str, Tensor],
    input_size: tuple[int, ...],
    *,
    places: str = "learned",
    seed: int = 0,
) -> None:
    """Give the layers of `model` the ROIs of a trained network, which from then on do not learn.

    The multiply-adds are those of the trained network, whatever the places.

    Args:
        model: a network with target layers; its weights stay.
        rois: tensors by name, among them every layer's loc and scale: the `state_dict()` of a network like `model`.
        input_size: of an image, (C, H, W).
        places: "learned": loc and scale as they are. "centred": each ROI, as it is cut to the map, has as many pixels
            along each axis in the middle of the map (half a pixel before it, where they can't be halved). "random": as
            many anywhere on the map, every place as likely as any other. Axes that a ROI covers whole stay so.
        seed: of the random places; the same ones on every machine (NumPy guarantees RandomState's stream).

    ValueError for tensors of another network, an empty ROI, for a layer that runs on maps of several sizes, and for one
    whose ROIs are no rectangles that are the same for all images.
    """
    if places not in PLACES:
        raise ValueError(unknown("places", places, PLACES))
    require_rectangles(model, "ROIs that do not learn are one rectangle for each kernel")
    names = attention_parameters(model)
    if not names:
        raise ValueError("the network has no layers with ROIs that could be given others")
    wrong = [n for n in sorted(names) if n not in rois or rois[n].shape != model.get_parameter(n).shape]
    if wrong:
        raise ValueError(f"the ROIs are of another network: {wrong[0]} is not there, or of another shape")
    for name in names:
        model.get_parameter(name).copy_(rois[name])
    if places != "learned":
        random = RandomState(seed) if places == "random" else None
        layers = roi_layers(model)
        for name, size in _map_sizes(model, input_size).items():
            _place_(name, layers[name], size, random)
    freeze_rois_(model)


def freeze_rois_(model: nn.Module) -> None:
    """Let every layer's ROIs stay as they are: loc, scale and rho do not learn."""
    for name in attention_parameters(model):
        model.get_parameter(name).requires_grad_(False)


def _anywhere(room: Tensor, random: RandomState) -> Tensor:
    """Whole numbers from 0 to `room`, both included, as likely as each other: int64 [C]."""
    return torch.from_numpy(random.randint(0, room.cpu().numpy() + 1, dtype=np.int64)).to(room.device)


def _map_sizes(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of every layer with ROIs that runs, in the order of execution."""
    sizes: dict[str, tuple[int, ...]] = {}
    for row in count_macs(model, input_size).target_layers:
        if sizes.setdefault(row.name, row.map_size) != row.map_size:
            raise ValueError(
                f"{row.name} runs on maps of {sizes[row.name]} and of {row.map_size} pixels: "
                "its ROIs can't be moved and keep their pixels on both"
            )
    return sizes


def _place_(name: str, layer: RoiLayer, size: tuple[int, ...], random: RandomState | None) -> None:
    """Move the layer's ROIs on maps of `size` to the middle, or with `random` anywhere, with all of their pixels."""
    wanted = layer.rois(size)
    for axis, length in enumerate(size):
        sides = wanted[:, axis, 1] - wanted[:, axis, 0]
        room = length - sides
        begins = room // 2 if random is None else _anywhere(room, random)
        wanted[:, axis] = torch.stack((begins, begins + sides), dim=1)
        layer.loc[axis] = (begins + sides / 2).double() / length
        layer.scale[axis] = torch.where(
            # A whole axis is covered from its middle too, with a little to spare.
            sides == length,
            layer.scale[axis].double().clamp(min=(length - 0.5) / (sqrt(2) * length)),
            sides.double() * least_scale(1, length, layer.scale.dtype),
        )
    if (wanted[..., 0] == wanted[..., 1]).any():
        raise ValueError(f"{name} has an empty ROI, which has no place")
    if not torch.equal(layer.rois(size), wanted):
        raise ValueError(f"{name}: {layer.loc.dtype} is too coarse for ROIs on maps of {size} pixels")
