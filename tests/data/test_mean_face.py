from __future__ import annotations

import numpy as np
import pytest
import torch
from own_images import FACE, MIRROR, face_rows

from tkn.data.face import PAIN_FACE, FaceWarp
from tkn.data.mean_face import mean_face


def _landmarks(count: int = 40) -> np.ndarray:
    rows = face_rows(count)
    return np.array([[[row[f"{axis}{k}"] for axis in "xy"] for k in range(len(FACE))] for row in rows])


def test_the_mean_of_turned_and_scaled_faces_is_upright_and_symmetric() -> None:
    landmarks = _landmarks()
    scaled = landmarks * np.random.RandomState(1).uniform(0.5, 3, (len(landmarks), 1, 1))
    face = mean_face(scaled, symmetric=True)
    assert face.mirror is not None
    assert face.mirror.tolist() == MIRROR
    flipped = face.points[face.mirror] * torch.tensor([-1, 1]) + torch.tensor([1, 0])
    assert torch.equal(flipped, face.points)
    assert torch.equal(face.points.amin(0), torch.zeros(2))
    assert torch.equal(face.points.amax(0), torch.ones(2))
    low, high = FACE.min(axis=0), FACE.max(axis=0)
    expected = torch.from_numpy((FACE - low) / (high - low)).float()
    torch.testing.assert_close(face.points, expected, rtol=0, atol=0.02)
    plain = mean_face(scaled, symmetric=False)
    assert plain.mirror is None
    torch.testing.assert_close(plain.points, expected, rtol=0, atol=0.04)


def test_pairs_may_be_given() -> None:
    pairs = [[0, 1], [3, 2], [5, 6]]
    face = mean_face(_landmarks(), symmetric=True, pairs=pairs)
    assert face.mirror is not None
    assert face.mirror.tolist() == MIRROR
    for wrong, message in (
        ([[0, 9]], r"\[0, 9\] must be two landmarks of 0\.\.8"),
        ([[0]], "must be two landmarks"),
        ([[0, 1], [1, 2]], "a landmark may be in one pair only"),
    ):
        with pytest.raises(ValueError, match=message):
            mean_face(_landmarks(), symmetric=True, pairs=wrong)


def test_a_face_from_the_side_has_no_mirror_image() -> None:
    profile = np.random.RandomState(0).rand(1, 8, 2) + 0.01 * np.random.RandomState(1).rand(20, 8, 2)
    with pytest.raises(ValueError, match=r"not its own mirror image .* data\.mirror, or give data\.flip=false"):
        mean_face(profile, symmetric=True)
    assert mean_face(profile, symmetric=False).mirror is None


def test_the_papers_mirror_is_found_from_the_papers_face() -> None:
    points = PAIN_FACE.points.double().numpy()
    noise = 0.01 * np.random.RandomState(0).randn(50, *points.shape)
    face = mean_face(200 * (points + noise), symmetric=True)
    assert face.mirror is not None
    assert PAIN_FACE.mirror is not None
    assert torch.equal(face.mirror, PAIN_FACE.mirror)


def test_faces_are_warped_onto_it() -> None:
    """A picture of its own x and y: at each landmark's place in the warped face are the landmark's coordinates."""
    landmarks = torch.from_numpy(_landmarks(3)).float()
    face = mean_face(_landmarks(), symmetric=True)
    y, x = torch.meshgrid(torch.arange(50) + 0.5, torch.arange(60) + 0.5, indexing="ij")
    warped = FaceWarp(64, face)(torch.stack((x, y)).expand(3, 2, 50, 60), landmarks)
    nose = (face.points[4] * 64).int()
    torch.testing.assert_close(warped[:, :, nose[1], nose[0]], landmarks[:, 4], rtol=0, atol=1.0)
