"""Anyone's faces: images with landmarks, and a class or a number to predict, by the pain archive's warp (Sec. 4.1)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tkn.app.messages import unknown
from tkn.data.base import TASKS, DataSet, Split, Task
from tkn.data.face import FaceWarp, WarpFaces, check_landmark_noise, crop_face
from tkn.data.face_table import FaceTable, find_table, number_in, read_table
from tkn.data.images import for_each, open_image
from tkn.data.mean_face import mean_face
from tkn.data.own import (
    MIN_SIDE,
    check_classes,
    check_loading,
    describe_own,
    divide,
    find_folder,
    normalisation,
    sort_classes,
)
from tkn.data.partition import Division, Labels, bins, joined
from tkn.data.preparation import convert

_log = logging.getLogger(__name__)

#: The side of the crops that are kept, in sides of the warped face: what the warp samples from must be finer.
_CROP = 2
#: How far outside its image a landmark may be, in the face's width or height: finders of landmarks guess a chin that
#: is cut off. The image's border goes on there.
_OUTSIDE = 0.25
_PARTS = ("train", "test")


def load_faces(
    data_dir: Path,  # noqa: ARG001  # as of every loader; these images lie at `path`
    *,
    path: str,
    target: str,
    task: str | None = None,
    size: int = 48,
    normalise: str | None = None,
    test_share: float | None = None,
    folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    landmark_noise: float = 0.01,
    flip: bool = True,
    mirror: list[list[int]] | None = None,
    workers: int | None = None,
) -> DataSet:
    """The faces of the one CSV file in `path`, with columns `file`, x0, y0, x1, y1, ... in pixels, and others.

    Images lie in `path`, or in its folder `images`. A column `split` ("train", "test") says what is for testing, unless
    `test_share` or `folds` is given; faces that share a text in a column `group`, or an image (whatever
    `file` calls it), are on one side.

    Args:
        target: the column to predict.
        task: "classification" or "regression"; None for texts, which are classes.
        size: side of the warped face.
        normalise: None or "imagenet".
        test_share, folds, fold, seed: see `Division`.
        landmark_noise, flip: of training faces (see `WarpFaces`).
        mirror: pairs of landmarks that change places in a mirror; None: found in the mean face.
        workers: threads that read; None: as many as the process has cores.

    The reference face is the training faces' mean shape. ValueError or FileNotFoundError, in one line that names the
    file and the line or the option, for what is not so.
    """
    division = Division(test_share, folds, fold, seed)
    check_loading(0, workers)
    check_landmark_noise(landmark_noise)
    mean, std = normalisation(normalise, 3)
    if size < MIN_SIDE:
        raise ValueError(f"data.size={size} must be at least {MIN_SIDE} pixels")
    if mirror is not None and not flip:
        raise ValueError("data.mirror is for data.flip=true")
    root = find_folder(path)
    table = read_table(find_table(root))
    kind, classes, labels = _targets(table, target, task)
    strata = bins(labels) if kind == "regression" else labels
    files = table.column("file", "the first line")
    paths = [_find(root, table, index) for index in range(len(table))]
    partitions = _partitions(table, paths)
    groups = _groups(partitions, files)
    chosen = divide(division, strata, groups, None if division.wanted else _test(table))
    for part, faces in zip(_PARTS, chosen, strict=True):
        if not len(faces):
            raise ValueError(f"{table.path}: no face is left to {part} on with {division}")
    for column, labels_of in partitions.items():
        _check_apart(table, column, labels_of, chosen)
    if kind == "classification":
        check_classes(table.path, classes, [labels[part] for part in chosen], division)

    start = perf_counter()
    crops, landmarks = _read_crops(table, paths, size, workers)
    _log.info("read %s faces in %.1f s", f"{len(table):,}", perf_counter() - start)
    face = mean_face(table.landmarks[chosen[0]], symmetric=flip, pairs=mirror)
    targets = torch.from_numpy(labels if kind == "classification" else labels[:, None])
    train, test = (
        Split((torch.from_numpy(crops[part]), torch.from_numpy(landmarks[part])), targets[torch.from_numpy(part)])
        for part in chosen
    )
    what = f"{target} ({len(classes)} classes)" if kind == "classification" else f"{target} (a number)"
    return DataSet(
        name="faces",
        source=describe_own(path, chosen, "faces", what, division),
        task=kind,
        input_size=(3, size, size),
        num_outputs=len(classes) or 1,
        train=train,
        test=test,
        to_input=WarpFaces(landmark_noise, flip, FaceWarp(size, face), mean, std),
        classes=classes,
        grouped=groups is not None,
    )


def _targets(table: FaceTable, target: str, task: str | None) -> tuple[Task, tuple[str, ...], NDArray[Any]]:
    """The task, its classes, and what is to be told of each face: int64 or float32 [N]."""
    if task is not None and task not in TASKS:
        raise ValueError(unknown("data.task", task, TASKS))
    texts = table.column(target, "data.target")
    numbers = [number_in(text) for text in texts]
    if task is None and all(map(math.isfinite, numbers)):
        raise ValueError(f"data.target={target} is a column of numbers: give data.task={' or data.task='.join(TASKS)}")
    if task == "regression":
        for index, number in enumerate(numbers):
            if not math.isfinite(number):
                raise table.error(index, f"{target} is {texts[index]!r}, expected a number")
        return "regression", (), np.array(numbers, np.float32)
    classes = sort_classes(set(texts))
    number_of = {name: number for number, name in enumerate(classes)}
    return "classification", classes, np.array([number_of[text] for text in texts], np.int64)


def _partitions(table: FaceTable, paths: list[Path]) -> dict[str, Labels]:
    """Of which group each face is, where the table says so, and of which image; by the column that says it."""
    names = {"file": [str(path.resolve()) for path in paths]}  # several texts may name one file
    if "group" in table.columns:
        names = {"group": table.column("group", "the first line")} | names
    return {column: np.unique(texts, return_inverse=True)[1] for column, texts in names.items()}


def _groups(partitions: Mapping[str, Labels], files: list[str]) -> Labels | None:
    """What faces must stay together: those of a group, and those of an image; None if each is on its own."""
    named = partitions["group"] if "group" in partitions else np.unique(files, return_inverse=True)[1]
    groups = joined(named, partitions["file"])
    return groups if "group" in partitions or groups.max() + 1 < len(files) else None


def _test(table: FaceTable) -> NDArray[np.bool_]:
    """Whether each face is for testing, as the column `split` says."""
    if "split" not in table.columns:
        raise ValueError(f"{table.path} has no column 'split': give data.test_share=0.2, say, or data.folds=5")
    texts = table.column("split", "the first line")
    for index, text in enumerate(texts):
        if text not in _PARTS:
            raise table.error(index, f"split is {text!r}, expected train or test")
    test = np.array([text == "test" for text in texts])
    if test.all() or not test.any():
        raise ValueError(f"{table.path}: column split has no {'train' if test.all() else 'test'}")
    return test


def _check_apart(table: FaceTable, column: str, groups: Labels, chosen: tuple[Labels, Labels]) -> None:
    """ValueError for a group, or an image, on both sides."""
    train, test = chosen
    first = {int(groups[index]): int(index) for index in train[::-1]}
    for index in np.sort(test):
        if (other := first.get(int(groups[index]))) is not None:
            name = table.columns[column][index]
            raise table.error(
                index, f"{column} {name!r} is for testing here, and for training in line {table.lines[other]}"
            )


def _find(root: Path, table: FaceTable, index: int) -> Path:
    name = table.columns["file"][index]
    for path in (root / name, root / "images" / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{table.path}, line {table.lines[index]}: {name} is neither in {root} nor in its images")


def _read_crops(
    table: FaceTable, paths: list[Path], size: int, workers: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The faces' crops [N, 3, side, side], and their landmarks [N, n, 2] in their pixels."""
    side = _CROP * size
    crops = np.empty((len(paths), 3, side, side), np.uint8)
    landmarks = np.empty(table.landmarks.shape, np.float32)

    def read(index: int) -> None:
        try:
            image = convert(open_image(paths[index]), 3)
            _check_inside(table.landmarks[index], image.size)
            crops[index], landmarks[index] = crop_face(image, table.landmarks[index], side)
        except ValueError as error:
            text = str(error)
            named = text if text.startswith(str(paths[index])) else f"{paths[index]}: {text}"
            raise table.error(index, named) from error

    for_each(read, len(paths), workers)
    return crops, landmarks


def _check_inside(landmarks: NDArray[np.float64], size: tuple[int, int]) -> None:
    face = np.maximum(landmarks.max(axis=0) - landmarks.min(axis=0), 1)
    outside = np.maximum(-landmarks, landmarks - size) / face
    worst = int(outside.max(axis=1).argmax())
    if outside[worst].max() > _OUTSIDE:
        x, y = landmarks[worst]
        raise ValueError(f"landmark {worst} at ({x:g}, {y:g}) is outside the image of {size[0]}x{size[1]} pixels")
