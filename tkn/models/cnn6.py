"""CNN6 and TKN6: six layers without batch normalisation (Table 1, Sec. 4.3)."""

from __future__ import annotations

from torch import nn

from tkn.models.common import Convolutions, require_size
from tkn.sequential import TargetSequential


def cnn6(
    name: str, input_size: tuple[int, int, int], num_outputs: int, convolutions: Convolutions, dropout: float = 0.5
) -> nn.Sequential:
    """5x5 convolutions of 256, 256, 128 kernels with 2x2 max pooling between, FC 328, 192, `num_outputs`.

    `input_size`: (C, H, W), at least 4x4. Maps [B, C, H, W] -> [B, num_outputs].
    """
    require_size(name, input_size, 4)
    channels, height, width = input_size
    sequential = TargetSequential if convolutions.targeted else nn.Sequential
    return sequential(
        convolutions.target(channels, 256, 5, block=0),
        nn.ReLU(),
        nn.MaxPool2d(2),
        convolutions.target(256, 256, 5, block=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        convolutions.target(256, 128, 5, block=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128 * (height // 4) * (width // 4), 328),
        nn.ReLU(),
        nn.Linear(328, 192),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(192, num_outputs),
    )
