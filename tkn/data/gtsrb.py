"""GTSRB, the German Traffic Sign Recognition Benchmark (Sec. 4.1), in the folders torchvision unpacks it to."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tkn.data.base import DataSet, Split, check_source, describe_counts
from tkn.data.download import fetch
from tkn.data.preparation import Preparation

BASE_URL = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
TRAIN, TEST, TEST_LABELS = "GTSRB/Training", "GTSRB/Final_Test/Images", "GT-final_test.csv"
#: what an archive unpacks to -> archive, md5, as in torchvision.datasets.GTSRB
ARCHIVES = {
    TRAIN: ("GTSRB-Training_fixed.zip", "513f3c79a4c5141765e10e952eaa2478"),
    TEST: ("GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185"),
    TEST_LABELS: ("GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
}
HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
#: by ClassId
CLASSES = (
    "speed limit 20",
    "speed limit 30",
    "speed limit 50",
    "speed limit 60",
    "speed limit 70",
    "speed limit 80",
    "end of speed limit 80",
    "speed limit 100",
    "speed limit 120",
    "no passing",
    "no passing for lorries",
    "right of way at the next crossing",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no lorries",
    "no entry",
    "general caution",
    "dangerous curve left",
    "dangerous curve right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic signals",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "ice or snow",
    "wild animals",
    "end of all limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "straight or right",
    "straight or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no passing",
    "end of no passing for lorries",
)
NUM_CLASSES = len(CLASSES)
FULL_COUNTS = (39_209, 12_630)
SIDE = 32


@dataclass(frozen=True)
class _Annotation:
    """One row of an annotation file, in pixels of the original image; `row` names it in messages."""

    row: str
    image: Path
    size: tuple[int, int]  # width, height
    box: tuple[int, int, int, int]  # x1, y1, x2, y2
    label: int


def load_gtsrb(data_dir: Path, *, source: str = "auto") -> DataSet:
    """The 39,209 / 12,630 signs of 43 classes (Sec. 4.1): uint8 RGB [N, 3, 32, 32], labels int64 [N].

    Reads `data_dir/gtsrb/GTSRB/{Training,Final_Test}` and `data_dir/gtsrb/GT-final_test.csv`, downloading what is
    missing. Each image's box is cropped and resized to 32x32 (bilinear, antialiased). X2 and Y2 are exclusive: only so
    has the border around the signs the documented 5 pixels on every side. A box refers to the image size recorded with
    it and is scaled where the file is a resized copy. Training images come track by track (a track is 30 images of one
    sign) in a shuffled order that never changes: the first or last N hold many classes and split at most one track.

    `source="full"` refuses a set with fewer images; `"auto"` reads it and says so in `DataSet.source`, which tells
    of resized copies too. FileNotFoundError for what is missing and not to be had; ValueError for an unknown
    `source` and for damaged files.
    """
    check_source(source)
    folder = data_dir / "gtsrb"
    for part, (archive, md5) in ARCHIVES.items():
        if not (folder / part).exists():
            try:
                _download(folder, part, archive, md5)
            except OSError as error:
                raise FileNotFoundError(
                    f"{folder / part} is missing: {error}; unpack {archive} into {folder}, or choose another data_dir"
                ) from error
    train = []
    for label in range(NUM_CLASSES):
        class_folder = folder / TRAIN / f"{label:05d}"
        train += _annotations(class_folder / f"GT-{label:05d}.csv", class_folder, range(label, label + 1))
    test = _annotations(folder / TEST_LABELS, folder / TEST, range(NUM_CLASSES))
    train = _shuffle_tracks(train)
    description = describe_counts(source, folder, (len(train), len(test)), FULL_COUNTS)
    train_split, train_resized = _read(train)
    test_split, test_resized = _read(test)
    if resized := train_resized + test_resized:
        sizes = {f" to {width}x{height}" for width, height in resized}
        where = sizes.pop() if len(sizes) == 1 else ""
        description += f" ({len(resized):,} of {len(train) + len(test):,} images are copies rescaled{where})"
    return DataSet(
        name="gtsrb",
        source=description,
        task="classification",
        input_size=(3, SIDE, SIDE),
        num_outputs=NUM_CLASSES,
        train=train_split,
        test=test_split,
        classes=CLASSES,
        preparation=Preparation(3, (SIDE, SIDE)),  # of an image that is cropped to the sign's box
    )


def _download(folder: Path, part: str, archive: str, md5: str) -> None:
    """Fetch an archive and put the `part` it unpacks to under `folder`, whole or not at all."""
    path = folder / archive
    fetch([f"{BASE_URL}/{archive}"], path, md5)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as unpacked, zipfile.ZipFile(path) as zipped:
            zipped.extractall(unpacked)
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(unpacked) / part, folder / part)
    finally:
        path.unlink()


def _annotations(path: Path, images: Path, labels: range) -> list[_Annotation]:
    """The rows of one annotation file about the files in `images`; only `labels` may occur."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a text file ({error})") from error
    if lines[:1] != [HEADER]:
        raise ValueError(f"{path}: the first line must be {HEADER}")
    annotations = []
    for number, line in enumerate(lines[1:], start=2):
        row = f"{path}, line {number}"
        try:
            name, *numbers = line.split(";")
            width, height, x1, y1, x2, y2, label = map(int, numbers)
        except ValueError as error:
            raise ValueError(f"{row}: {line!r} does not give {HEADER}") from error
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise ValueError(f"{row}: the box {x1},{y1}-{x2},{y2} is not inside the {width}x{height} image")
        if label not in labels:
            raise ValueError(f"{row}: ClassId is {label}, expected {labels[0]}..{labels[-1]}")
        annotations.append(_Annotation(row, images / name, (width, height), (x1, y1, x2, y2), label))
    return annotations


def _shuffle_tracks(annotations: list[_Annotation]) -> list[_Annotation]:
    """The same rows with the tracks (TRACK_FRAME.ppm, within a class) in an order that never changes."""
    tracks: dict[tuple[int, str], list[_Annotation]] = {}
    for annotation in annotations:
        tracks.setdefault((annotation.label, annotation.image.name.split("_")[0]), []).append(annotation)
    shuffled = list(tracks.values())
    # NumPy guarantees this generator's stream never to change.
    order = np.random.RandomState(0).permutation(len(shuffled))
    return [annotation for track in order for annotation in shuffled[track]]


def _read(annotations: list[_Annotation]) -> tuple[Split, list[tuple[int, int]]]:
    """The cropped images, and the (width, height) of each file whose size is not the recorded one.

    One thread: the images are so small that several only wait for the interpreter lock (measured slower).
    """
    images = np.empty((len(annotations), SIDE, SIDE, 3), np.uint8)
    resized = []
    for pixels, annotation in zip(images, annotations, strict=True):
        try:
            # From memory: Image.open on a path spends more time on the file than on the image.
            image = Image.open(io.BytesIO(annotation.image.read_bytes()), formats=["PPM"]).convert("RGB")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{annotation.image} is missing, named in {annotation.row}") from error
        except Exception as error:  # what Pillow raises on a damaged file depends on the damage
            raise ValueError(f"{annotation.image} is not a readable PPM image ({type(error).__name__})") from error
        if image.size != annotation.size:
            resized.append(image.size)
        # Multiplied first: a whole-numbered edge stays whole.
        left, top, right, bottom = (
            edge * actual / recorded
            for edge, actual, recorded in zip(annotation.box, image.size * 2, annotation.size * 2, strict=True)
        )
        # Cropped before it is resized: otherwise the filter would take in pixels beyond the box.
        x, y = floor(left), floor(top)
        sign = image.crop((x, y, ceil(right), ceil(bottom)))
        sign = sign.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(left - x, top - y, right - x, bottom - y))
        pixels[:] = np.asarray(sign)
    labels = torch.tensor([annotation.label for annotation in annotations], dtype=torch.int64)
    return Split((torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),), labels), resized
