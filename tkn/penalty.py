"""The penalty that makes ROIs shrink: L2 on the scales, built up by beta over the network's blocks (Sec. 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tkn.attention import at_least_float32
from tkn.layers import roi_layers


def scale_penalty(model: nn.Module, l2: float, beta: float = 1.0) -> Tensor:
    """l2 * sum over ROI layers of beta^block * sum of scale^2, over both axes and all kernels.

    Returns a scalar tensor on the model's device, in float64 if the scales are, else in float32; zero for a model
    without ROI layers. ValueError if `l2` or `beta` is negative.
    """
    if l2 < 0 or beta < 0:
        raise ValueError(f"l2={l2} and beta={beta} of the scale penalty must not be negative")
    # In half precision the sum would hide what many scales lose in a step.
    terms = [beta**layer.block * at_least_float32(layer.scale).square().sum() for layer in roi_layers(model).values()]
    if not terms:
        return torch.zeros((), device=next((p.device for p in model.parameters()), "cpu"))
    return l2 * torch.stack(terms).sum()
