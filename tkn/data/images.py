"""Image files: which there are, and what is in one."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

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
    image = open_header(path)
    try:
        image.load()
    except Exception as error:  # what Pillow raises on a damaged file depends on the damage
        raise ValueError(f"{path} is damaged or truncated ({error or type(error).__name__})") from error
    return image


def open_header(path: Path) -> Image.Image:
    """The same, of which nothing but the header is decoded yet."""
    try:
        # From memory: Image.open on a path spends more time on the file than on the image, and keeps it open.
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    if not content:
        raise ValueError(f"{path} is empty")
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        # A JPEG of the kind MPO, as phones make them, holds a preview too.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception as error:  # as above
        raise ValueError(f"{path} is not a readable image ({', '.join(_FORMATS)}; {type(error).__name__})") from error
    if frames > 1:
        raise ValueError(f"{path} is animated or has several pages: {frames} images, where one is expected")
    return image
