"""Image files: which there are, and what is in them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tkn.data.preparation import Preparation, check_depth, convert

#: How the names of image files end, in any case, and the formats that are opened, whatever a name says.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def find_images(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, in the order of their names; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def open_image(path: Path) -> Image.Image:
    """The image in a file, decoded. FileNotFoundError if there is none; ValueError naming the file, in one line, for
    one that is empty, damaged, truncated, animated or of another format.
    """
    with _reading(path):
        # From memory: Image.open on a path spends more time on the file than on the image.
        content = path.read_bytes()
    image = _opened(path, io.BytesIO(content))
    try:
        image.load()
    except Exception as error:  # what Pillow raises on a damaged file depends on the damage
        raise ValueError(f"{path} is damaged or truncated ({error or type(error).__name__})") from error
    return image


def check_header(path: Path, size: tuple[int, int] | None = None) -> None:
    """The same errors, as far as a file's first bytes tell them; and ValueError for more than 8 bits a channel, and for
    an image that has another `size` (height, width), upright or turned: its EXIF tag may stand at the file's end.
    """
    with _reading(path):
        file = path.open("rb")
    with file:
        image = _opened(path, file)
        with _naming(path):
            check_depth(image)
            if size is not None and image.size != size:  # (height, width) as (width, height): it may be turned
                _check_size(image.size, size)


def read_pixels(path: Path, preparation: Preparation, *, as_it_is: bool = False) -> NDArray[np.uint8]:
    """uint8 [C, H, W] of a file's image. Errors as of `open_image`, and ValueError for more than 8 bits a channel.

    as_it_is: the image must have the preparation's size already.
    """
    image = open_image(path)
    with _naming(path):
        upright = convert(image, preparation.channels)
        if as_it_is:
            _check_size(upright.size, preparation.size)
        return preparation.pixels(upright)


def _check_size(found: tuple[int, int], wanted: tuple[int, int]) -> None:
    """ValueError for an image of `found` (width, height) that is not `wanted` (height, width)."""
    height, width = wanted
    if found != (width, height):
        raise ValueError(
            f"it has {found[0]}x{found[1]} pixels, the first image {width}x{height}: "
            "images of several sizes need data.size, to which they are scaled"
        )


@dataclass(frozen=True)
class ImageFiles:
    """Reads images by their numbers in `paths`, with so many threads (`None`: as many as the process has cores)."""

    paths: tuple[Path, ...]
    preparation: Preparation
    workers: int | None
    as_it_is: bool

    def __call__(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """int64 [B] -> uint8 [B, C, H, W]. Errors as of `read_pixels`."""
        (numbers,) = batch
        chosen = [self.paths[number] for number in numbers.tolist()]
        images = np.empty((len(chosen), *self.preparation.input_size), np.uint8)

        def read(index: int) -> None:
            images[index] = read_pixels(chosen[index], self.preparation, as_it_is=self.as_it_is)

        for_each(read, len(chosen), self.workers)
        return (torch.from_numpy(images),)

    def check(self) -> None:
        """Errors as of `check_header`, of any of them."""
        size = self.preparation.size if self.as_it_is else None
        for_each(lambda index: check_header(self.paths[index], size), len(self.paths), self.workers)


def for_each(task: Callable[[int], None], count: int, workers: int | None) -> None:
    """Do the task for 0 to `count` - 1 with threads; the first error ends it."""
    with ThreadPoolExecutor(workers or _cores()) as pool:
        try:
            for _ in pool.map(task, range(count)):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _opened(path: Path, file: io.BytesIO | io.BufferedReader) -> Image.Image:
    """The image in the opened file, of which nothing but the header is decoded yet."""
    if not file.read(1):
        raise ValueError(f"{path} is empty")
    file.seek(0)
    try:
        image = Image.open(file, formats=_FORMATS)
        # A JPEG of the kind MPO, as phones make them, holds a preview too.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception as error:  # what Pillow raises on a damaged file depends on the damage
        raise ValueError(f"{path} is not a readable image ({', '.join(_FORMATS)}; {type(error).__name__})") from error
    if frames > 1:
        raise ValueError(f"{path} is animated or has several pages: {frames} images, where one is expected")
    return image


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before a ValueError's message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
