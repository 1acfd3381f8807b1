"""The plan's answers for many image files; those that can't be read do not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tkn.data.images import find_images, open_image
from tkn.predict.predictor import Predictor


@dataclass(frozen=True)
class Answer:
    """Of one file.

    ranked: (class, score) of the likeliest classes, the first first; value: the number that a regression tells instead.
    """

    path: Path
    ranked: tuple[tuple[str, float], ...] = ()
    value: float | None = None


def list_images(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths`, and the image files in and below the folders among them; each once.

    ValueError for a folder without images. What is not there is found missing when it is opened.
    """
    found: dict[Path, None] = {}
    for path in paths:
        inside = find_images(path) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no image file")
        found.update(dict.fromkeys(inside))
    return list(found)


def answers(
    predictor: Predictor, paths: Sequence[Path], batch: int, top: int, refuse: Callable[[str], None]
) -> Iterator[Answer]:
    """Of every file that can be read, `batch` of them at a time; `refuse` gets a line for each of the others.

    `top`: how many classes; ValueError if there are fewer.
    """
    for start in range(0, len(paths), batch):
        read: dict[Path, Tensor] = {}
        for path in paths[start : start + batch]:
            try:
                read[path] = _input(predictor, path)
            except (OSError, ValueError) as error:
                refuse(str(error))
        if read:
            outputs = predictor.outputs(torch.stack(list(read.values())))
            yield from (_answer(predictor, path, row, top) for path, row in zip(read, outputs, strict=True))


def _input(predictor: Predictor, path: Path) -> Tensor:
    image = open_image(path)
    try:
        return predictor.prepare(image)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _answer(predictor: Predictor, path: Path, row: Tensor, top: int) -> Answer:
    if predictor.is_regression(len(row)):
        return Answer(path, value=float(row[0]))
    if top > len(row):
        raise ValueError(f"--top {top}: {predictor.path} has {len(row)} classes")
    scores, indices = row.topk(top)
    names = map(predictor.name, indices.tolist())
    return Answer(path, tuple(zip(names, scores.tolist(), strict=True)))
