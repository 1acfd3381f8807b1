"""How the report's figures look: readable in print at their own size, in vector and in pixels."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tkn.app.files import whole_file

#: Inches across: a page's text in most journals.
PAGE = 7.0
#: Characters that fit across it in a title.
_TITLE_WIDTH = 100
_DPI = 220

_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 10,
    "axes.linewidth": 0.7,
    "pdf.fonttype": 42,  # TrueType: some publishers refuse Type 3
    "image.interpolation": "nearest",
}


@dataclass(frozen=True)
class Picture:
    """A figure's files in the report's folder: `path` is the one to show, `others` the same in other formats."""

    title: str
    caption: str
    alt: str
    path: Path
    others: tuple[Path, ...] = ()


@contextmanager
def print_style() -> Iterator[None]:
    """Within the context new figures have the report's fonts."""
    with matplotlib.rc_context(_STYLE):
        yield


def save_print(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write a figure of `print_style` as `name`.png and `name`.pdf, the same bytes for the same figure."""
    paths = folder / f"{name}.png", folder / f"{name}.pdf"
    with print_style():
        # Once for both: it takes most of the time.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for path in paths:
            metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
            with whole_file(path) as temporary:
                figure.savefig(temporary, dpi=_DPI, metadata=metadata)
    return paths


def wrapped(title: str, inches: float = PAGE) -> str:
    """A title in as many lines as a figure of this width needs."""
    return "\n".join(textwrap.wrap(title, int(_TITLE_WIDTH * inches / PAGE)))


def slug(text: str) -> str:
    """A part of a file's name: at most 100 letters, digits, dots and underscores."""
    return re.sub(r"[^a-z0-9.]+", "_", text.lower()).strip("_")[:100]


def plain_axis(axis: Axes) -> None:
    """No frame but the two axes, and a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.set_axisbelow(True)
