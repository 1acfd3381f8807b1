"""TC-ResNet8 (Choi et al., "Temporal Convolution for Real-time Keyword Spotting on Mobile Devices", 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Channels of the first convolution and of the three blocks.
_WIDTHS = (16, 24, 32, 48)
#: Frames that a block's convolutions see.
_KERNEL = 9


class TcResNet8(nn.Module):
    """A keyword spotter: the coefficients of a second of speech are the channels of maps of one dimension, time.

    [B, coefficients, frames] -> [B, keywords].
    """

    def __init__(self, coefficients: int, keywords: int) -> None:
        super().__init__()
        first, *widths = _WIDTHS
        self.first = nn.Conv1d(coefficients, first, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*map(_Block, _WIDTHS, widths))
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Dropout(), nn.Linear(widths[-1], keywords, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.first(x)))


class _Block(nn.Module):
    """Two convolutions beside one of single frames; half as many frames come out."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.one = nn.Conv1d(inputs, outputs, _KERNEL, 2, _KERNEL // 2, bias=False)
        self.two = nn.Conv1d(outputs, outputs, _KERNEL, padding=_KERNEL // 2, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm1d(outputs), nn.BatchNorm1d(outputs)
        self.beside = nn.Sequential(nn.Conv1d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm_one(self.one(x)))
        return torch.relu(self.norm_two(self.two(y)) + self.beside(x))
