"""STN and TSTN: a spatial transformer before a five-layer CNN (Table 1, Sec. 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tkn.models.common import Convolutions, require_size


def _stage(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(), nn.MaxPool2d(2)]


def _fully_connected(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]


class SpatialTransformer(nn.Module):
    """Warps images by an affine transform that a small network reads off their half-resolution copies.

    The identity at the start. [B, C, H, W] -> [B, C, H, W].
    """

    def __init__(self, input_size: tuple[int, int, int], convolutions: Convolutions) -> None:
        super().__init__()
        channels, height, width = input_size
        self.localization = nn.Sequential(
            nn.MaxPool2d(2),
            *_stage(convolutions.plain(channels, 16, 7)),
            *_stage(convolutions.plain(16, 32, 5)),
            *_stage(convolutions.plain(32, 64, 3)),
            nn.Flatten(),
            *_fully_connected(64 * (height // 16) * (width // 16), 128),
            *_fully_connected(128, 64),
        )
        self.affine = nn.Linear(64, 6)

    def reset_transform(self) -> None:
        """Make the transform the identity for every image."""
        nn.init.zeros_(self.affine.weight)
        with torch.no_grad():
            self.affine.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        theta = self.affine(self.localization(x)).to(x.dtype).view(-1, 2, 3)
        # In the images' own precision: bfloat16 could not place a pixel.
        with torch.autocast(x.device.type, enabled=False):
            grid = F.affine_grid(theta, list(x.shape), align_corners=False)
            return F.grid_sample(x, grid, align_corners=False)


def stn(
    name: str, input_size: tuple[int, int, int], num_outputs: int, convolutions: Convolutions, dropout: float = 0.6
) -> nn.Sequential:
    """A spatial transformer, then convolutions of 128 (7x7), 128 (5x5), 256 (3x3) kernels, FC 96, `num_outputs`.

    Batch normalisation and ReLU after every layer between, 2x2 max pooling after every convolution. At least 16x16
    pixels. The localization network works at half resolution: with it the paper's 145M multiply-adds come out.
    """
    require_size(name, input_size, 16)
    channels, height, width = input_size
    return nn.Sequential(
        SpatialTransformer(input_size, convolutions),
        *_stage(convolutions.target(channels, 128, 7, block=0)),
        *_stage(convolutions.target(128, 128, 5, block=1)),
        *_stage(convolutions.target(128, 256, 3, block=2)),
        nn.Flatten(),
        *_fully_connected(256 * (height // 8) * (width // 8), 96),
        nn.Dropout(dropout),
        nn.Linear(96, num_outputs),
    )
