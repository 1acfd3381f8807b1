"""The penalty that makes ROIs shrink: L2 on the scales, built up by beta over the network's blocks (Sec. 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from tkn.layers import roi_layers
from tkn.macs import count_macs, kernel_macs


def scale_penalty(model: nn.Module, l2: float, beta: float = 1.0, costs: Mapping[str, float] | None = None) -> Tensor:
    """l2 * sum over ROI layers of beta^block * sum of scale^2, over both axes and all kernels.

    Of adaptive layers the squares are the mean over the images of the last training pass.

    `costs`: what each layer's sum is multiplied by besides, by the layer's name; see `kernel_costs`.

    Returns a scalar tensor on the model's device, in float64 if the scales are, else in float32; zero for a model
    without ROI layers. ValueError if `l2` or `beta` is negative.
    """
    if l2 < 0 or beta < 0:
        raise ValueError(f"l2={l2} and beta={beta} of the scale penalty must not be negative")
    terms = [
        beta**layer.block * (1.0 if costs is None else costs[name]) * layer.squared_scales().sum()
        for name, layer in roi_layers(model).items()
    ]
    if not terms:
        return torch.zeros((), device=next((p.device for p in model.parameters()), "cpu"))
    return l2 * torch.stack(terms).sum()


def kernel_costs(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, float]:
    """What one kernel of each ROI layer costs on its whole map, in multiples of the mean over all kernels.

    With these as `costs` the scale penalty weighs a kernel by its multiply-adds for one image of `input_size`, (C, H,
    W): an early kernel of a ResNet costs eight times a late one. A layer that runs twice costs both.
    """
    layers = roi_layers(model)
    macs = dict.fromkeys(layers, 0)
    for row in count_macs(model, input_size).target_layers:
        macs[row.name] += kernel_macs(layers[row.name]) * prod(row.map_size)
    kernels = {name: layer.num_kernels for name, layer in layers.items()}
    mean = sum(macs[name] * kernels[name] for name in layers) / max(1, sum(kernels.values()))
    return {name: macs[name] / mean if mean else 0.0 for name in layers}
