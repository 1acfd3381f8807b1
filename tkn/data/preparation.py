"""From an image to a network's input: plain data, which goes along with a trained network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tkn.app.messages import first_line

#: Modes of Pillow's images that hold more than 8 bits a channel: which of them are black and white nobody can tell.
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")

#: Mean and deviation of ImageNet's channels: what torchvision's and timm's pretrained weights were trained with.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Preparation:
    """Prepares an image as the images were that a network was trained and tested on.

    channels: 1 (grey) or 3 (RGB).
    size: (height, width) in pixels, to which an image is stretched: bilinear, antialiased.
    mean, std: of each channel in the range 0-1; subtracted, and divided by. None: neither.

    ValueError for values that cannot be.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"preparation: channels={self.channels!r} must be 1 (grey) or 3 (RGB)")
        if len(self.size) != 2 or not all(type(side) is int and side >= 1 for side in self.size):
            raise ValueError(f"preparation: size={self.size!r} must be two whole numbers, height and width")
        if (self.mean is None) != (self.std is None):
            raise ValueError("preparation: mean and std must be given both or neither")
        for name, values in (("mean", self.mean), ("std", self.std)):
            valid = values is None or (len(values) == self.channels and all(map(_is_number, values)))
            if not valid or (name == "std" and values is not None and min(values) <= 0):
                kind = "positive numbers" if name == "std" else "numbers"
                raise ValueError(f"preparation: {name}={values!r} must be {self.channels} {kind}, one for each channel")

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the input."""
        return (self.channels, *self.size)

    def __call__(self, image: Image.Image) -> Tensor:
        """The input, float32 [C, H, W]. ValueError for more than 8 bits a channel, and for damaged EXIF data."""
        return self.to_input(torch.from_numpy(self.pixels(image))[None])[0]

    def pixels(self, image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The image upright (EXIF), grey or RGB, at this size: uint8 [C, H, W]. ValueError as above."""
        upright = convert(image, self.channels)
        height, width = self.size
        if upright.size != (width, height):
            upright = upright.resize((width, height), Image.Resampling.BILINEAR)
        array = np.asarray(upright)
        return array[None].copy() if self.channels == 1 else array.transpose(2, 0, 1).copy()

    def to_input(self, pixels: Tensor, augmentation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """uint8 [B, C, H, W] -> float32 [B, C, H, W], augmented between 0-1 and normalised."""
        images = pixels.float().div_(255)
        return normalise(images if augmentation is None else augmentation(images), self.mean, self.std)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, lists and None alone, as JSON holds them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Preparation:
        """Of what `to_dict` gave. ValueError for anything else."""
        names = {item.name for item in fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise ValueError(f"preparation: {content!r:.100} must have the keys {', '.join(sorted(names))}")
        if not all(isinstance(content[key], list) for key in ("size", "mean", "std") if content[key] is not None):
            raise ValueError("preparation: size, mean and std must be lists")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
        }
        return cls(**values)


def convert(image: Image.Image, channels: int) -> Image.Image:
    """The image upright as its EXIF tag says, grey (1 channel) or RGB (3).

    CMYK, palettes and the like are converted by Pillow; transparency is dropped. ValueError for more than 8 bits a
    channel, and for damaged EXIF data.
    """
    check_depth(image)
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # what Pillow raises depends on the damage
        raise ValueError(f"its EXIF data are damaged ({first_line(error)})") from error
    return upright.convert("L" if channels == 1 else "RGB")


def check_depth(image: Image.Image) -> None:
    """ValueError for an image of more than 8 bits a channel."""
    if image.mode in _DEEP_MODES:
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits first")


def normalise(x: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """(x - mean) / std by channel, in place: [B, C, H, W]."""
    if mean is not None and std is not None:
        for channel, (centre, deviation) in enumerate(zip(mean, std, strict=True)):
            x[:, channel].sub_(centre).div_(deviation)  # by scalars: a tensor would have to be sent to the device
    return x


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
