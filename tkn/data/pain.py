"""The UNBC-McMaster shoulder pain archive: faces with 66 landmarks and a pain intensity of 0-16 (Sec. 4.1, Pain)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tkn.app.messages import unknown
from tkn.data.base import DataSet, Split
from tkn.data.face import REFERENCE, FaceWarp, WarpFaces, check_landmark_noise, crop_face
from tkn.data.images import for_each
from tkn.data.partition import Division, Labels, bins, joined

#: Side in pixels of the crops kept in memory: all 48,398 frames take 1.3 GB.
CROP = 96
MAX_PAIN = 16
FULL_COUNT = 48_398
SIDE = 48


def load_pain(
    data_dir: Path,
    *,
    test_subjects: int | list[str] = 7,
    folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    landmark_noise: float = 0.01,
    flip: bool = True,
) -> DataSet:
    """The archive under `data_dir/pain`, in its own layout: see `read_archive` for the options and errors.

    Raises FileNotFoundError where the archive is missing: its owners hand it out on request only.
    """
    division = Division(None, folds, fold, seed)
    root = data_dir / "pain"
    for folder in ("Images", "AAM_landmarks", "Frame_Labels/PSPI"):
        if not (root / folder).is_dir():
            raise FileNotFoundError(
                f"{root / folder}: the UNBC-McMaster pain archive is expected here; "
                "it cannot be downloaded, request it from its owners (data=pain_synthetic needs no archive)"
            )
    data = read_archive(
        root,
        name="pain",
        source="full",
        test_subjects=test_subjects,
        division=division,
        landmark_noise=landmark_noise,
        flip=flip,
    )
    count = len(data.train) + len(data.test)
    if count == FULL_COUNT:
        return data
    return replace(data, source=division.after(f"partial: {count:,} of {FULL_COUNT:,} frames"))


def read_archive(
    root: Path,
    *,
    name: str,
    source: str,
    test_subjects: int | list[str],
    division: Division,
    landmark_noise: float,
    flip: bool,
) -> DataSet:
    """Reads an archive in the layout of UNBC-McMaster into crops of `CROP` pixels with their landmarks.

    `Images/<subject>/<sequence>/<frame>.png`, `AAM_landmarks/<subject>/<sequence>/<frame>_aam.txt` (66 lines "x y",
    pixels), `Frame_Labels/PSPI/<subject>/<sequence>/<frame>_facs.txt` (one number, 0-16). The test partition is all
    sequences of `test_subjects`, the last n of the sorted subjects or those named, or of the subjects of one fold of
    `division`, which then follows the `source`; the rest is for training. `landmark_noise` and `flip` are for training
    only (see `tkn.data.face.WarpFaces`).

    Raises ValueError for an option that cannot be, a subject or sequence on both sides, and a malformed file;
    FileNotFoundError for a frame without landmarks or label. The message names the file.
    """
    check_landmark_noise(landmark_noise)
    images = sorted(path for path in (root / "Images").glob("*/*/*.png") if not path.name.startswith("."))
    if not images:
        raise ValueError(f"{root / 'Images'}: no subject with frames (<subject>/<sequence>/<frame>.png)")
    if division.wanted:
        labels = _read_labels(root, images)
        test = division.test(_strata(labels), _subjects(images), "subjects")
    else:
        test_names = _choose_test_subjects(sorted({path.parts[-3] for path in images}), test_subjects)
        test = np.array([path.parts[-3] in test_names for path in images])
        _check_disjoint(images, test)
        labels = _read_labels(root, images)
    return DataSet(
        name=name,
        source=division.after(source),
        task="regression",
        input_size=(3, SIDE, SIDE),
        num_outputs=1,
        train=_read_split(root, images, labels, ~test),
        test=_read_split(root, images, labels, test),
        to_input=WarpFaces(landmark_noise, flip, FaceWarp(SIDE)),
    )


def _choose_test_subjects(subjects: list[str], chosen: int | list[str]) -> set[str]:
    if isinstance(chosen, int):
        if not 0 < chosen < len(subjects):
            raise ValueError(
                f"data.test_subjects={chosen}: must be at least 1 and leave one for training; "
                f"the archive has {len(subjects)} subjects"
            )
        return set(subjects[-chosen:])
    for subject in chosen:
        if subject not in subjects:
            raise ValueError(unknown("subject in data.test_subjects", subject, subjects))
    if not 0 < len(set(chosen)) < len(subjects):
        raise ValueError(f"data.test_subjects={list(chosen)}: name at least 1 and leave one for training")
    return set(chosen)


def _strata(labels: NDArray[np.float32]) -> Labels:
    """Tenths of the frames by size, but frames of one value, as most have no pain, are of one stratum."""
    ordered = np.sort(labels)
    return bins(ordered)[np.searchsorted(ordered, labels)]


def _subjects(images: list[Path]) -> Labels:
    """Of which subject each frame is. Folders that share a number, or the name of a sequence, are of one."""
    numbers = [_number(path.parts[-3]) for path in images]
    sequences = [path.parts[-2] for path in images]
    return joined(*(np.unique(names, return_inverse=True)[1] for names in (numbers, sequences)))


def _number(subject: str) -> str:
    """A subject's number is its name up to the dash: 042-ll042."""
    return subject.split("-")[0]


def _check_disjoint(images: list[Path], test: NDArray[np.bool_]) -> None:
    """Two folders may share a subject's number, or the name of a sequence, but not across sides."""
    sides = [
        {(path.parts[-3], path.parts[-2]) for path, tested in zip(images, test, strict=True) if tested == side}
        for side in (False, True)
    ]
    train_subjects = {_number(subject): subject for subject, _ in sorted(sides[0])}
    train_sequences = {sequence: subject for subject, sequence in sorted(sides[0])}
    for subject, sequence in sorted(sides[1]):
        if same := train_subjects.get(_number(subject)):
            raise ValueError(f"data.test_subjects: {same} (training) and {subject} (test) are the same subject")
        if same := train_sequences.get(sequence):
            raise ValueError(
                f"data.test_subjects: sequence {sequence} is under both {same} (training) and {subject} (test)"
            )


def _read_labels(root: Path, images: list[Path]) -> NDArray[np.float32]:
    labels = np.empty(len(images), np.float32)

    def read(index: int) -> None:
        labels[index] = _read_label(root / "Frame_Labels" / "PSPI" / f"{_frame(images[index])}_facs.txt", images[index])

    for_each(read, len(images), None)
    return labels


def _read_split(root: Path, images: list[Path], labels: NDArray[np.float32], chosen: NDArray[np.bool_]) -> Split:
    indices = np.flatnonzero(chosen)
    crops = np.empty((len(indices), 3, CROP, CROP), np.uint8)
    landmarks = np.empty((len(indices), len(REFERENCE), 2), np.float32)

    def read(number: int) -> None:
        crops[number], landmarks[number] = _read_face(root, images[indices[number]])

    for_each(read, len(indices), None)
    return Split((torch.from_numpy(crops), torch.from_numpy(landmarks)), torch.from_numpy(labels[indices, None]))


def _frame(image: Path) -> Path:
    """subject/sequence/frame, without an ending."""
    return Path(*image.parts[-3:-1]) / image.stem


def _read_face(root: Path, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Crop [3, CROP, CROP], landmarks [66, 2] in the crop's pixels."""
    landmarks = _read_landmarks(root / "AAM_landmarks" / f"{_frame(path)}_aam.txt", path)
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:  # Pillow's plugins raise nearly anything
        raise ValueError(f"{path}: cannot decode the image ({error})") from error
    try:
        return crop_face(image, landmarks, CROP)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_landmarks(path: Path, image: Path) -> NDArray[np.float64]:
    if not path.is_file():
        raise FileNotFoundError(f"{image}: no landmarks, expected at {path}")
    rows = [line.split() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if len(rows) != len(REFERENCE):
        raise ValueError(f"{path}: {len(rows)} landmarks, expected {len(REFERENCE)}")
    try:
        landmarks = np.array(rows, dtype=np.float64)
    except ValueError:
        landmarks = np.empty(0)
    if landmarks.shape != (len(REFERENCE), 2) or not np.isfinite(landmarks).all():
        raise ValueError(f"{path}: each line must hold two finite numbers, x and y")
    return landmarks


def _read_label(path: Path, image: Path) -> float:
    if not path.is_file():
        raise FileNotFoundError(f"{image}: no pain label, expected at {path}")
    text = path.read_text(errors="replace").strip()
    try:
        label = float(text)
    except ValueError:
        label = math.nan
    if not 0 <= label <= MAX_PAIN:
        raise ValueError(f"{path}: pain label {text[:20]!r}, expected one number of 0-{MAX_PAIN}")
    return label
