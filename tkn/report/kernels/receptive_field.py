"""Which pixels of the image a kernel's responses inside its ROI depend on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from tkn.layers import RoiLayer, TargetConv2d
from tkn.report.kernels.hooks import Change, hooked_outputs
from tkn.roi import roi_mask

_BATCH = 32


def receptive_fields(
    model: nn.Module, input_size: tuple[int, int, int], layers: Mapping[str, RoiLayer]
) -> dict[str, Tensor]:
    """For each of the model's layers (by name) the box of every kernel: int64 [C, 2, 2], (lo, hi) of rows and columns.

    The smallest box of the image (C, H, W) outside of which no pixel changes the kernel's responses inside its ROI,
    whatever the weights: through kernels, strides, poolings and padding, and through the ROIs of the layers before, for
    what these clip cannot be seen. Of a kernel that depends on no pixel the box is empty.

    Every row and every column of an image in turn is made NaN, which is passed on to whatever is computed from it, also
    by weights of zero and by maxima. ValueError if the network's responses are NaN without that, and for a layer that
    is run several times for an image.
    """
    # In float64 torch's convolutions go tap by tap; Winograd's and others would spread the NaNs over their tiles.
    network = copy.deepcopy(model).double().eval()
    copied = {name: network.get_submodule(name) for name in layers}
    reached: dict[str, list[Tensor]] = {name: [] for name in layers}
    with ExitStack() as stack, torch.no_grad():
        for name, layer in copied.items():
            assert isinstance(layer, RoiLayer)
            if isinstance(layer, TargetConv2d):
                layer.engine = "dense"
            stack.enter_context(hooked_outputs(layer, _recorder(layer, reached[name])))
        for images in _marked_images(input_size):
            network(images)
    height, width = input_size[1:]
    fields = {}
    for name, parts in reached.items():
        seen = torch.cat(parts)
        if len(seen) != 1 + height + width:
            raise ValueError(f"layer {name} is run several times for an image: its kernels have no one receptive field")
        if seen[0].any():
            raise ValueError(f"layer {name} gives NaN: the network has diverged, or divides by zero")
        axes = (_extent(seen[1 : 1 + height]), _extent(seen[1 + height : 1 + height + width]))
        fields[name] = torch.stack(axes, dim=1)
    return fields


def _marked_images(input_size: tuple[int, int, int]) -> Iterator[Tensor]:
    """Batches of float64 [B, C, H, W]: one image as it is, then with each row of NaN, then with each column."""
    height, width = input_size[1:]
    image = torch.rand(input_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    marks = torch.cat((torch.tensor([-1]), torch.arange(height + width)))
    for part in marks.split(_BATCH):
        images = image.repeat(len(part), 1, 1, 1)
        for marked, mark in zip(images, part.tolist(), strict=True):
            if mark >= height:
                marked[:, :, mark - height] = torch.nan
            elif mark >= 0:
                marked[:, mark] = torch.nan
        yield images


def _recorder(layer: RoiLayer, reached: list[Tensor]) -> Change:
    def record(output: Tensor) -> Tensor:
        size = tuple(output.shape[2:])
        inside = roi_mask(size, layer.rois(size))
        reached.append((output.isnan() & inside).flatten(2).any(dim=2))
        # The layer multiplies by the window's zeros there, which leaves a NaN.
        return torch.where(inside, output, 0.0) if layer.clip else output

    return record


def _extent(seen: Tensor) -> Tensor:
    """bool [L, C] -> int64 [C, 2]: the first that is true of each kernel, and the one after the last; zeros if none."""
    length = len(seen)
    lo = seen.int().argmax(dim=0)
    hi = length - seen.flip(0).int().argmax(dim=0)
    return torch.stack((lo, hi), dim=1) * seen.any(dim=0).unsqueeze(1)
