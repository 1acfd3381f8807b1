"""Random flips, shifts and crops of training images, each image its own, on the device that they are on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image; by default nothing.

    flip: mirror left and right, with probability 1/2.
    flip_vertical: mirror top and bottom, with probability 1/2.
    shift: move by whole pixels, at most this part of the width and height; what comes in repeats the border.
    crop: cut out a part whose sides are `crop` to 1 times the image's, anywhere inside, and enlarge it again.

    ValueError for a `shift` outside [0, 0.5] or a `crop` outside (0, 1].
    """

    flip: bool = False
    flip_vertical: bool = False
    shift: float = 0.0
    crop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.shift <= 0.5:
            raise ValueError(f"data.augment.shift={self.shift} must be within [0, 0.5], a part of the image's sides")
        if not 0 < self.crop <= 1:
            raise ValueError(f"data.augment.crop={self.crop} must be within (0, 1], a part of the image's sides")

    def __call__(self, images: Tensor) -> Tensor:
        """float32 [B, C, H, W] -> the same, by random numbers of the device's default generator."""
        if self.shift or self.crop < 1:
            images = self._moved(images)
        for wanted, axis in ((self.flip, -1), (self.flip_vertical, -2)):
            if wanted:
                images = flip_half(images, axis)
        return images

    def _moved(self, images: Tensor) -> Tensor:
        """By one sampling: the window's centre and half its sides, in units in which an image spans -1 to 1."""
        count, device = len(images), images.device
        sides = torch.tensor([images.shape[-1], images.shape[-2]], dtype=torch.float32, device=device)
        scale = 1 - (1 - self.crop) * torch.rand(count, 1, device=device)
        centre = (1 - scale) * (2 * torch.rand(count, 2, device=device) - 1)
        furthest = (self.shift * sides).floor()
        pixels = ((2 * furthest + 1) * torch.rand(count, 2, device=device)).floor() - furthest
        centre = centre + 2 * pixels / sides
        affine = torch.cat((torch.diag_embed(scale.expand(count, 2)), centre[:, :, None]), dim=2)
        with torch.autocast(device.type, enabled=False):  # half precision would move pixels
            grid = F.affine_grid(affine, list(images.shape), align_corners=False)
            return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def flip_half(images: Tensor, axis: int = -1) -> Tensor:
    """[B, C, H, W] with each image mirrored along `axis` with probability 1/2."""
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flipped, images.flip(axis), images)
