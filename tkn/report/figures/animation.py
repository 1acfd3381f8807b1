"""The ROIs' way through a training as an animated GIF, a frame an epoch."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from tkn.app.files import whole_file
from tkn.drawing.figures import BETWEEN_COLOUR, ROI_COLOUR
from tkn.drawing.mosaic import Mosaic
from tkn.report.runs.roi_states import MANY_KERNELS, RoiStates, layer_title

_WIDTH = 760
_MARGIN = 12
_FRAMES = 60
_MILLISECONDS = 450
_LAST_MILLISECONDS = 2500
_FONT_SIZE = 15


def _bytes(colour: str) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in to_rgb(colour))
    return red, green, blue


_GRAYS = 240
_BETWEEN, _ROI = _bytes(BETWEEN_COLOUR), _bytes(ROI_COLOUR)


def save_animation(states: RoiStates, title: str, path: Path) -> int:
    """Write the GIF, which runs for ever and rests on the last epoch; returns its number of frames.

    A run of many epochs is shown by 60 of them at most, its first and last among them.
    """
    count = len(states.epochs)
    shown = sorted({round(index) for index in np.linspace(0, count - 1, min(count, _FRAMES))})
    palette = _palette()
    font = _font()
    frames = [_frame(states, state, title, font).quantize(palette=palette, dither=Image.Dither.NONE) for state in shown]
    durations = [_MILLISECONDS] * (len(frames) - 1) + [_LAST_MILLISECONDS]
    with whole_file(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return len(frames)


def _palette() -> Image.Image:
    """Grays and the two colours: the same for all frames, so that only what moves changes."""
    palette = Image.new("P", (1, 1))
    grays = [round(255 * index / (_GRAYS - 1)) for index in range(_GRAYS)]
    palette.putpalette([channel for gray in grays for channel in (gray,) * 3] + [*_BETWEEN, *_ROI])
    return palette


def _font() -> FreeTypeFont:
    """The font of the other figures, which comes with Matplotlib."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", _FONT_SIZE)


def _frame(states: RoiStates, state: int, title: str, font: FreeTypeFont) -> Image.Image:
    names = list(states.layers)
    columns = min(2 if states.kernels > MANY_KERNELS else 3, len(names))
    cell = (_WIDTH - (columns + 1) * _MARGIN) // columns
    tiles = [_tile(states.mosaic(name, state), cell) for name in names]
    line = _FONT_SIZE + 6
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + line + _MARGIN for row in rows]
    title_lines = _lines(title, font)
    top = _MARGIN + line * (len(title_lines) + 1)
    frame = Image.new("RGB", (_WIDTH, top + sum(heights)), "white")
    draw = ImageDraw.Draw(frame)
    epoch = states.epochs[state]
    when = "start" if epoch == 0 else f"epoch {epoch} of {states.epochs[-1]}"
    for number, text in enumerate([*title_lines, when]):
        draw.text((_MARGIN, _MARGIN // 2 + number * line), text, fill="black", font=font)
    for index, (name, tile) in enumerate(zip(names, tiles, strict=True)):
        x = _MARGIN + (index % columns) * (cell + _MARGIN)
        y = top + sum(heights[: index // columns])
        draw.text((x, y), layer_title(name), fill="black", font=font)
        frame.paste(tile, (x, y + line))
    return frame


def _lines(title: str, font: FreeTypeFont) -> list[str]:
    """The title, broken where the frame ends."""
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= _WIDTH - 2 * _MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _tile(mosaic: Mosaic, side: int) -> Image.Image:
    """A mosaic, `side` pixels across."""
    height, width = mosaic.image.shape
    factor = side / width
    gray = np.nan_to_num(mosaic.image)[..., None].repeat(3, axis=2) * 255
    pixels = np.where(np.isnan(mosaic.image)[..., None], np.array(_BETWEEN), gray).round().astype(np.uint8)
    method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
    tile = Image.fromarray(pixels).resize((side, round(height * factor)), method)
    draw = ImageDraw.Draw(tile)
    many = len(mosaic.boxes) > MANY_KERNELS
    for left, top, right, bottom in mosaic.boxes:
        if right > left and bottom > top:
            x0, y0, x1, y1 = (round(edge * factor) for edge in (left, top, right, bottom))
            draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=_ROI, width=1 if many else 2)
    return tile
