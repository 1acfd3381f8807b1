"""A drawn stand-in for the pain archive, in its layout: for tests, demonstrations and CI, never for results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tkn.data.base import DataSet
from tkn.data.face import REFERENCE
from tkn.data.pain import MAX_PAIN, read_archive
from tkn.data.partition import Division

Points = NDArray[np.float64]
Colour = tuple[int, int, int]

#: Part of the archive's name: raise it when a drawing changes.
VERSION = 1
WIDTH, HEIGHT = 320, 240
#: Drawn larger, then averaged: ImageDraw does not smooth edges.
ZOOM = 2

# Wrinkles from one point between two landmarks to another, (from, to, how far): they darken with the pain. The warp
# takes away the landmarks' own movement; like a real face's wrinkles, these stay to be seen.
_WRINKLES = (
    ((21, 22, 0.3), (21, 27, 0.6)),  # between the brows
    ((22, 21, 0.3), (22, 27, 0.6)),
    ((28, 39, 0.4), (28, 42, 0.4)),  # across the nose
    ((31, 2, 0.2), (48, 4, 0.3)),  # from the nose past the mouth
    ((35, 14, 0.2), (54, 12, 0.3)),
    ((36, 0, 0.2), (36, 0, 0.8)),  # beside the eyes
    ((45, 16, 0.2), (45, 16, 0.8)),
)


@dataclass(frozen=True)
class _Subject:
    """Neutral landmarks [66, 2] in units of the face's width, and colours."""

    shape: Points
    skin: Colour
    hair: Colour
    lips: Colour
    iris: Colour
    background: Colour


def load_pain_synthetic(
    data_dir: Path,
    *,
    subjects: int = 25,
    sequences: int = 2,
    frames: int = 20,
    seed: int = 0,
    test_subjects: int | list[str] = 7,
    folds: int | None = None,
    fold: int = 0,
    landmark_noise: float = 0.01,
    flip: bool = True,
) -> DataSet:
    """Draws an archive of `subjects` x `sequences` x `frames` pictures and reads it as `load_pain` reads the real one.

    It is drawn once, under `data_dir/pain_synthetic-<options>`, from the options alone: the same landmarks and labels
    on every machine, the same pixels with the same Pillow. The face's expression follows the label: brows lower, eyes
    close, mouth opens and widens, wrinkles darken. The folds are of the same seed as the drawings. Raises ValueError
    for counts below 1, a seed outside 0 - 2^32-1, and as `read_archive` does.
    """
    counts = {"subjects": subjects, "sequences": sequences, "frames": frames}
    for key, count in counts.items():
        if count < 1:
            raise ValueError(f"data.{key}={count}: must be at least 1")
    division = Division(None, folds, fold, seed)
    root = data_dir / f"pain_synthetic-v{VERSION}-{subjects}x{sequences}x{frames}-seed{seed}"
    if not root.is_dir():
        data_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=data_dir, prefix=f".{root.name}-") as temporary:
            archive = Path(temporary) / root.name
            _write_archive(archive, subjects, sequences, frames, RandomState(seed))
            try:
                archive.rename(root)
            except OSError:  # another run was faster
                if not root.is_dir():
                    raise
    return read_archive(
        root,
        name="pain_synthetic",
        source=f"synthetic: {subjects} drawn subjects, {sequences} sequences of {frames} frames each, seed {seed}",
        test_subjects=test_subjects,
        division=division,
        landmark_noise=landmark_noise,
        flip=flip,
    )


def _write_archive(root: Path, subjects: int, sequences: int, frames: int, random: RandomState) -> None:
    for index in range(subjects):
        number = 42 + 3 * index
        code = f"{chr(97 + index % 26)}{chr(97 + (7 * index + 3) % 26)}{number:03d}"
        subject = _make_subject(random)
        for take in range(1, sequences + 1):
            sequence = Path(f"{number:03d}-{code}", f"{code}t{take}aaaff")
            folders = [root / kind / sequence for kind in ("Images", "AAM_landmarks", "Frame_Labels/PSPI")]
            for folder in folders:
                folder.mkdir(parents=True)
            position = random.uniform([-10, 100, 145, 120], [10, 125, 175, 130])
            for frame, label in enumerate(_make_labels(frames, random), start=1):
                stem = f"{sequence.name}{frame:03d}"
                jitter = random.uniform([-2, -3, -3, -3], [2, 3, 3, 3])
                image, landmarks = _draw(subject, label / MAX_PAIN, position + jitter)
                image.save(folders[0] / f"{stem}.png", compress_level=1)
                np.savetxt(folders[1] / f"{stem}_aam.txt", landmarks, fmt="%16.7e", delimiter="")
                np.savetxt(folders[2] / f"{stem}_facs.txt", [label], fmt="%16.7e")


def _make_labels(frames: int, random: RandomState) -> NDArray[np.int64]:
    """[frames]: zero, but for one ramp up and down, its peak 4-16."""
    time = (np.arange(frames) + 0.5) / frames
    peak, centre, width = random.uniform([4, 0.25, 0.15], [MAX_PAIN, 0.75, 0.25])
    return np.rint(peak * np.maximum(1 - np.abs(time - centre) / width, 0)).astype(np.int64)


def _make_subject(random: RandomState) -> _Subject:
    shape = REFERENCE.double().numpy().copy()
    x, y = shape.T
    centred = x - 0.5  # a copy: x may change
    chin, eyes, mouth, nose = random.uniform(-1, 1, size=4)
    x[:17] += 0.15 * chin * centred[:17] * np.maximum(y[:17] - 0.3, 0)
    x[17:27] += 0.018 * eyes * np.sign(centred[17:27])
    x[36:48] += 0.018 * eyes * np.sign(centred[36:48])
    x[48:] += 0.15 * mouth * centred[48:]
    x[31:36] += 0.2 * nose * centred[31:36]
    y[17:27] += random.uniform(-0.02, 0.03)
    y[28:36] += random.uniform(-0.02, 0.03)
    y[48:] += random.uniform(-0.02, 0.03)
    y *= random.uniform(0.98, 1.12)
    dark, red = random.uniform(size=2)
    skin = np.array([240, 205, 180]) * (1 - dark) + np.array([125, 82, 60]) * dark
    lips = skin * [0.85 - 0.05 * red, 0.5, 0.5]
    hair = np.array([150, 110, 80]) * random.uniform(0.1, 0.45)
    iris, background = random.uniform([[40, 40, 30], [30, 30, 30]], [[90, 110, 140], [220, 220, 220]])
    return _Subject(shape, *(_colour(rgb) for rgb in (skin, hair, lips, iris, background)))


def _colour(rgb: NDArray[np.float64]) -> Colour:
    red, green, blue = (round(value) for value in rgb.tolist())
    return red, green, blue


def _express(shape: Points, pain: float) -> Points:
    """The landmarks [66, 2] of a neutral face at a pain of 0-1."""
    shape = shape.copy()
    x, y = shape.T
    y[17:27] += 0.04 * pain
    x[[21, 22]] += np.array([0.02, -0.02]) * pain
    for eye in (slice(36, 42), slice(42, 48)):
        middle = y[eye].mean()
        y[eye] = middle + (y[eye] - middle) * (1 - 0.85 * pain)
    x[48:] += 0.2 * pain * (x[48:] - 0.5)
    y[[49, 50, 51, 52, 53, 60, 61, 62]] -= 0.02 * pain
    y[[55, 56, 57, 58, 59, 63, 64, 65]] += 0.08 * pain
    y[3:14] += 0.04 * pain * np.sin(np.linspace(0, np.pi, 11))
    return shape


def _draw(subject: _Subject, pain: float, position: NDArray[np.float64]) -> tuple[Image.Image, Points]:
    """Picture and landmarks [66, 2] in pixels of a face at `position`: degrees, width and centre (x, y) in pixels."""
    angle, width, centre_x, centre_y = position
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))

    def place(points: Points) -> Points:
        # rounded, so that a last digit that differs between machines changes nothing
        return np.round((points - 0.5) @ np.array([[cos, sin], [-sin, cos]]) * width + [centre_x, centre_y], 4)

    shape = _express(subject.shape, pain)
    marks = place(shape)
    image = Image.new("RGB", (WIDTH * ZOOM, HEIGHT * ZOOM), subject.background)
    draw = ImageDraw.Draw(image)

    def pixels(points: Points) -> list[tuple[float, float]]:
        return [(x, y) for x, y in (points * ZOOM - 0.5).tolist()]  # ImageDraw counts from the first pixel's centre

    def line(points: Points, colour: Colour, thickness: float) -> None:
        draw.line(pixels(points), colour, round(thickness * width * ZOOM), joint="curve")

    def shade(factor: float) -> Colour:
        return _colour(np.array(subject.skin) * factor)

    turn = np.linspace(0, np.pi, 20)[1:-1]
    forehead = np.stack([0.5 + 0.5 * np.cos(turn), shape[0, 1] - 0.45 * np.sin(turn)], axis=1)
    hair = 0.5 + (np.concatenate([shape[[15, 16]], forehead, shape[[0, 1]]]) - 0.5) * 1.15
    neck = np.concatenate([shape[[4, 12]], [[0.75, 1.4], [0.25, 1.4]]])
    shirt = np.array([[0.2, 1.25], [0.8, 1.25], [1.5, 1.5], [1.5, 3], [-0.5, 3], [-0.5, 1.5]])
    draw.polygon(pixels(place(hair)), subject.hair)
    draw.polygon(pixels(place(neck)), shade(0.8))
    draw.polygon(pixels(place(shirt)), subject.iris)
    draw.polygon(pixels(place(np.concatenate([shape[:17], forehead]))), subject.skin)
    for ends in _WRINKLES:
        points = np.array([marks[start] + (marks[end] - marks[start]) * far for start, end, far in ends])
        line(points, shade(1 - 0.6 * pain), 0.02)
    for brow in (marks[17:22], marks[22:27]):
        line(brow, subject.hair, 0.03)
    for eye in (marks[36:42], marks[42:48]):
        draw.polygon(pixels(eye), (250, 250, 250))
        radius = np.linalg.norm(eye[1:3].mean(axis=0) - eye[4:].mean(axis=0)) / 2
        draw.ellipse(pixels(eye.mean(axis=0) + radius * np.array([[-1, -1], [1, 1]])), subject.iris)
        line(eye[[0, 1, 2, 3, 4, 5, 0]], shade(0.35), 0.012)
    line(marks[27:31], shade(0.8), 0.02)
    line(marks[31:36], shade(0.6), 0.025)
    draw.polygon(pixels(marks[48:60]), subject.lips)
    corners = (2 * marks[[48, 54]] + marks[[60, 62]] + marks[[65, 63]]) / 4  # the landmarks have none
    draw.polygon(pixels(np.concatenate([corners[:1], marks[60:63], corners[1:], marks[63:66]])), (60, 20, 20))
    return image.reduce(ZOOM), marks
