"""A small network for images of a fixed camera: model.factory=tkn.models.small_cnn:small_cnn (docs/pays.md)."""

from __future__ import annotations

from torch import nn

WIDTHS = (8, 12, 16, 24)


def small_cnn(input_size: tuple[int, int, int], num_outputs: int) -> nn.Module:
    """3x3 convolutions of 8, 12, 16 and 24 kernels with max pooling between, then the mean over the map."""
    layers: list[nn.Module] = []
    channels = input_size[0]
    for index, width in enumerate(WIDTHS):
        if index > 0:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_outputs))
