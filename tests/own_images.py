"""Small folders of images, and tables of faces, as a user might have them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

#: A face of nine landmarks in the unit square, x to the right: brows, eyes, nose, mouth, chin.
FACE = np.array(
    [(0.1, 0.1), (0.9, 0.1), (0.25, 0.3), (0.75, 0.3), (0.5, 0.55), (0.3, 0.75), (0.7, 0.75), (0.5, 0.7), (0.5, 1.0)]
)
MIRROR = [1, 0, 3, 2, 4, 6, 5, 7, 8]


def write_image(path: Path, seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    """An image of noise, (width, height) in size."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


def write_folder(root: Path, counts: Mapping[str, int], **options: Any) -> Path:
    """`root`/<class>/<number>.png, so many of each class; a class may be "train/cat"."""
    for number, (name, count) in enumerate(counts.items()):
        for index in range(count):
            write_image(root / name / f"{index:03}.png", 1000 * number + index, **options)
    return root


def face_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of faces on images of 60x50: turned, shifted and noisy; three of each subject, s0, s1, ..."""
    random = np.random.RandomState(seed)
    rows = []
    for index in range(count):
        angle = np.deg2rad(random.uniform(-10, 10))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = (FACE - 0.5 + 0.01 * random.randn(*FACE.shape)) @ turn.T * 30 + [30, 25] + random.uniform(-3, 3, 2)
        row: dict[str, Any] = {"file": f"f{index:03}.png", "age": 20 + index, "mood": ("calm", "glad")[index // 3 % 2]}
        row |= {"group": f"s{index // 3}", "split": "test" if index % 4 == 3 else "train"}
        row |= {
            f"{axis}{number}": round(point[k], 3) for number, point in enumerate(points) for k, axis in enumerate("xy")
        }
        rows.append(row)
    return rows


def write_faces(root: Path, rows: list[dict[str, Any]], *, without: tuple[str, ...] = ("group",)) -> Path:
    """`root`/people.csv and the images in `root`/images; some columns left out."""
    root.mkdir(exist_ok=True)
    columns = [name for name in rows[0] if name not in without]
    with (root / "people.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for index, row in enumerate(rows):
        if not (root / "images" / row["file"]).exists():
            write_image(root / "images" / row["file"], index, (60, 50))
    return root
