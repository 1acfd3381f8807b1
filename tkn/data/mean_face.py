"""A reference face from many faces' landmarks: their mean shape, upright, and its own mirror image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tkn.data.face import ReferenceFace

Points = NDArray[np.float64]
#: A shape is held as complex numbers x + iy [n], centred and of length 1: turning and scaling it is a product.
Shape = NDArray[np.complex128]
Permutation = NDArray[np.int64]

#: How far a mean face may be from its mirror image: the root mean square, in its own.
_ASYMMETRY = 0.15
_ROUNDS = 20
_GRID = 2**20


def mean_face(landmarks: Points, *, symmetric: bool, pairs: Sequence[Sequence[int]] | None = None) -> ReferenceFace:
    """The mean of faces [N, n, 2], aligned by generalised Procrustes analysis, stretched to fill the crop.

    With `symmetric`, it is made its own mirror image: by `pairs` of landmarks that change places (the others stay), or
    by those that are nearest to each other's mirror images. ValueError for impossible pairs and where there are none
    to be found.
    """
    shape = _procrustes_mean(landmarks)
    mirror = None
    if symmetric:
        mirror = _find_mirror(shape) if pairs is None else _as_permutation(pairs, len(shape))
        shape = _symmetrise(shape, mirror)
    points = np.stack((shape.real, shape.imag), axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - low) / (high - low)
    if mirror is not None:
        # In binary fractions the right half is exactly 1 - the left one.
        points = np.rint(points * _GRID) / _GRID
        points[:, 0] = (points[:, 0] + 1 - points[mirror, 0]) / 2
    return ReferenceFace(torch.from_numpy(points).float(), None if mirror is None else torch.from_numpy(mirror))


def _normalised(shapes: Shape) -> Shape:
    """[..., n], each centred and of length 1."""
    centred = shapes - shapes.mean(axis=-1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=-1, keepdims=True)


def _procrustes_mean(landmarks: Points) -> Shape:
    shapes = _normalised(landmarks[..., 0] + 1j * landmarks[..., 1])
    mean = shapes[0]
    for _ in range(_ROUNDS):
        turns = shapes.conj() @ mean
        mean = _normalised((shapes * (turns / np.abs(turns))[:, None]).mean(axis=0))
    # Turned as the pictures are in the mean.
    turn = np.vdot(mean, shapes.mean(axis=0))
    return mean * (turn / abs(turn))


def _mirrored(shape: Shape) -> Shape:
    return -shape.conj()


def _find_mirror(shape: Shape) -> Permutation:
    """Each landmark's partner: whichever its mirror image comes to lie on, after the best turn."""
    from scipy.optimize import linear_sum_assignment  # here, for it takes long to import

    reflected = _mirrored(shape)
    for _ in range(5):
        mirror = linear_sum_assignment(np.abs(shape[:, None] - reflected[None]))[1]
        turn = np.vdot(reflected[mirror], shape)
        reflected = reflected * (turn / abs(turn))
    difference = float(np.linalg.norm(shape - reflected[mirror]))
    if difference > _ASYMMETRY or not np.array_equal(mirror[mirror], np.arange(len(mirror))):
        raise ValueError(
            f"the mean face is not its own mirror image (it differs by {difference:.0%} of its size): "
            "name the landmarks that change places in data.mirror, or give data.flip=false"
        )
    return mirror


def _as_permutation(pairs: Sequence[Sequence[int]], count: int) -> Permutation:
    mirror = np.arange(count)
    for pair in pairs:
        if len(pair) != 2 or not all(0 <= index < count for index in pair):
            raise ValueError(f"data.mirror: {list(pair)} must be two landmarks of 0..{count - 1}")
        mirror[list(pair)] = list(pair)[::-1]
    if not np.array_equal(mirror[mirror], np.arange(count)) or len({i for p in pairs for i in p}) != 2 * len(pairs):
        raise ValueError("data.mirror: a landmark may be in one pair only")
    return mirror


def _symmetrise(shape: Shape, mirror: Permutation) -> Shape:
    """Turned upright, and the mean of it and its mirror image."""
    # If s is its own mirror image, turned by an angle it is twice as far from the mirror image of what it has become.
    turn = np.sqrt(np.vdot(_mirrored(shape)[mirror], shape))
    upright = shape * (turn / abs(turn)).conj()
    return (upright + _mirrored(upright)[mirror]) / 2
