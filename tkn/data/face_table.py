"""A table of faces: a CSV file with an image, its landmarks and whatever is known of it in each row."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tkn.app.messages import unknown

_COORDINATE = re.compile(r"[xy]\d+")
#: A triangulation needs a triangle.
_FEWEST_LANDMARKS = 3


@dataclass(frozen=True)
class FaceTable:
    """Its rows in order.

    path: of the file; lines: each row's, for messages; columns: by name, their texts without spaces around them;
    landmarks: [N, n, 2], (x, y) in pixels of the upright image (EXIF) from its top left corner.
    """

    path: Path
    lines: list[int]
    columns: dict[str, list[str]]
    landmarks: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.lines)

    def column(self, name: str, option: str) -> list[str]:
        """The texts of the column that an option names; ValueError if there is no such column, or a text is empty."""
        if name not in self.columns:
            raise ValueError(f"{self.path}: {unknown(f'column in {option}', name, self.columns)}")
        texts = self.columns[name]
        for index, text in enumerate(texts):
            if not text:
                raise self.error(index, f"column {name} is empty")
        return texts

    def error(self, index: int, what: str) -> ValueError:
        """Of the row with this index."""
        return ValueError(f"{self.path}, line {self.lines[index]}: {what}")


def find_table(folder: Path) -> Path:
    """The one CSV file in a folder. ValueError if there is none, or there are several."""
    tables = sorted(path for path in folder.glob("*.csv") if not path.name.startswith("."))
    if len(tables) != 1:
        names = f"several: {', '.join(path.name for path in tables)}" if tables else "none"
        raise ValueError(f"{folder} must hold one CSV file with the faces' landmarks, and holds {names}")
    return tables[0]


def read_table(path: Path) -> FaceTable:
    """ValueError, naming the line, for what is not a column `file` and columns x0, y0, x1, y1, ... of numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, [text.strip() for text in row]) for row in reader if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a readable CSV file ({error})") from error
    coordinates = _check_header(path, header)
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: {len(row)} fields, expected {len(header)} as in the first line")
    if not rows:
        raise ValueError(f"{path} has no rows below its first line")
    place = {name: index for index, name in enumerate(header)}
    landmarks = np.empty((len(rows), len(coordinates)))
    for index, (line, row) in enumerate(rows):
        for number, name in enumerate(coordinates):
            landmarks[index, number] = number_in(row[place[name]])
        if not np.isfinite(landmarks[index]).all():
            name = coordinates[int(np.isfinite(landmarks[index]).argmin())]
            raise ValueError(f"{path}, line {line}: {name} is {row[place[name]]!r}, expected a number of pixels")
    columns = {name: [row[at] for _, row in rows] for name, at in place.items() if name not in coordinates}
    return FaceTable(path, [line for line, _ in rows], columns, landmarks.reshape(len(rows), -1, 2))


def _check_header(path: Path, header: list[str]) -> list[str]:
    """The landmarks' columns, in order: x0, y0, x1, y1, ..."""
    if len(header) == 1 and ";" in header[0]:
        raise ValueError(f"{path}: its columns must be parted by commas, not semicolons")
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise ValueError(f"{path}: there are two columns {min(twice)!r}")
    if "file" not in header:
        raise ValueError(f"{path}: the first line has no column 'file'")
    found = {name for name in header if _COORDINATE.fullmatch(name)}
    count = max([_FEWEST_LANDMARKS, *(int(name[1:]) + 1 for name in found)])
    names = [f"{axis}{number}" for number in range(count) for axis in "xy"]
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path}: the first line has no column {missing[0]!r}, of landmarks x0, y0, x1, y1, ...")
    return names


def number_in(text: str) -> float:
    """NaN if there is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
