"""Anyone's images, in a folder for each class."""

from __future__ import annotations

import logging
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from tkn.data.augment import Augmentation
from tkn.data.base import DataSet, Split
from tkn.data.images import ImageFiles, find_images, open_image
from tkn.data.own import (
    check_classes,
    check_loading,
    check_size,
    describe_own,
    divide,
    find_folder,
    normalisation,
    sort_classes,
)
from tkn.data.partition import Division
from tkn.data.preparation import Preparation, convert

_log = logging.getLogger(__name__)

PARTS = ("train", "test")
_GREY_MODES = ("1", "L", "LA", "La")


class PreparedImages:
    """uint8 [B, C, H, W] -> float32 [B, C, H, W], augmented in training before it is normalised."""

    def __init__(self, preparation: Preparation, augmentation: Augmentation) -> None:
        self.preparation = preparation
        self.augmentation = augmentation

    def __call__(self, batch: tuple[Tensor, ...], augment: bool) -> Tensor:
        (images,) = batch
        return self.preparation.to_input(images, self.augmentation if augment else None)


def load_folder(
    data_dir: Path,  # noqa: ARG001  # as of every loader; these images lie at `path`
    *,
    path: str,
    size: int | list[int] | None = None,
    channels: int | None = None,
    normalise: str | None = None,
    test_share: float | None = None,
    folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    augment: Augmentation = Augmentation(),  # noqa: B008  # frozen
    memory: float = 4.0,
    workers: int | None = None,
) -> DataSet:
    """The images of `path`/train/<class>/ and `path`/test/<class>/, or of `path`/<class>/, and below.

    Args:
        size: side, or [height, width], to which images are scaled; None: they are of one size, and are taken as they
            are.
        channels: 1 (grey) or 3 (RGB); None: those of the first image.
        normalise: None or "imagenet".
        test_share, folds, fold, seed: see `Division`; without either share or folds there must be train and test, with
            them all images are divided anew.
        augment: of training images.
        memory: GiB of pixels; more are not kept, but read for every batch.
        workers: threads that read; None: as many as the process has cores.

    ValueError or FileNotFoundError, in one line that names the file or the option, for what is not so.
    """
    division = Division(test_share, folds, fold, seed)
    check_loading(memory, workers)
    wanted_size = None if size is None else check_size(size)
    if channels not in (None, 1, 3):
        raise ValueError(f"data.channels={channels} must be null, 1 (grey) or 3 (RGB)")
    root = find_folder(path)
    paths, labels, test, classes = _list(root, division)
    chosen = divide(division, labels, None, test)
    check_classes(root, classes, [labels[part] for part in chosen], division)

    preparation = _prepare(paths[0], wanted_size, channels, normalise)
    files = ImageFiles(tuple(paths), preparation, workers, as_it_is=size is None)
    in_memory = len(paths) * np.prod(preparation.input_size) <= memory * 2**30
    splits = _read(files, chosen, labels) if in_memory else _check(files, chosen, labels)
    return DataSet(
        name="folder",
        source=describe_own(path, chosen, "images", f"{len(classes)} classes", division),
        task="classification",
        input_size=preparation.input_size,
        num_outputs=len(classes),
        train=splits[0],
        test=splits[1],
        to_input=PreparedImages(preparation, augment),
        classes=classes,
        preparation=preparation,
        read=None if in_memory else files,
    )


def _list(root: Path, division: Division) -> tuple[list[Path], np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Every image's path and class, whether it is for testing where the folders say so, and the classes."""
    there = [part for part in PARTS if (root / part).is_dir()]
    if len(there) == 1:
        raise ValueError(f"{root} has a folder {there[0]}, but none {(set(PARTS) - set(there)).pop()}")
    if not there and not division.wanted:
        raise ValueError(f"{root} has no folders train and test: give data.test_share=0.2, say, or data.folds=5")
    found = [(part, *item) for part in there or [""] for item in _class_images(root / part)]
    classes = sort_classes({name for _, name, _ in found})
    if there:
        names = [{name for part, name, _ in found if part == wanted} for wanted in PARTS]
        for here, other, part in ((names[0], names[1], "train"), (names[1], names[0], "test")):
            if only := sort_classes(here - other):
                raise ValueError(f"{root}: class {only[0]!r} is in {part} only")
    index = {name: number for number, name in enumerate(classes)}
    labels = np.array([index[name] for _, name, _ in found], np.int64)
    test = None if division.wanted else np.array([part == "test" for part, _, _ in found])
    return [path for _, _, path in found], labels, test, classes


def _class_images(folder: Path) -> list[tuple[str, Path]]:
    """(class, image) of every image in the folders of a folder."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder} has no folders: there must be one for each class, with its images")
    found = []
    for one in classes:
        images = find_images(one)
        if not images:
            raise ValueError(f"{one} holds no image file: remove it, or put the class's images there")
        found += [(one.name, image) for image in images]
    return found


def _prepare(first: Path, size: tuple[int, int] | None, channels: int | None, normalise: str | None) -> Preparation:
    """From the options, or else as the first image is."""
    image = open_image(first)
    if channels is None:
        channels = 1 if image.mode in _GREY_MODES else 3
    if size is None:
        try:
            width, height = convert(image, channels).size
        except ValueError as error:
            raise ValueError(f"{first}: {error}") from error
        size = check_size([height, width])
    return Preparation(channels, size, *normalisation(normalise, channels))


def _read(files: ImageFiles, chosen: tuple[np.ndarray, ...], labels: np.ndarray) -> list[Split]:
    """The samples with their images."""
    start = perf_counter()
    splits = [Split(files((torch.from_numpy(part),)), torch.from_numpy(labels[part])) for part in chosen]
    _log.info("read %s images in %.1f s", f"{len(labels):,}", perf_counter() - start)
    return splits


def _check(files: ImageFiles, chosen: tuple[np.ndarray, ...], labels: np.ndarray) -> list[Split]:
    """The samples with their images' numbers."""
    files.check()
    size = len(labels) * np.prod(files.preparation.input_size) / 2**30
    _log.info("%s images take %.1f GiB, more than data.memory: they are read for every batch", f"{len(labels):,}", size)
    return [Split((torch.from_numpy(part),), torch.from_numpy(labels[part])) for part in chosen]
