from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tkn.data.augment import Augmentation


def _coordinates(count: int, height: int = 20, width: int = 30) -> Tensor:
    """Images [count, 2, H, W] whose channels are the x and y of each pixel."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((x, y)).float().expand(count, 2, height, width)


def test_nothing_happens_by_default() -> None:
    images = _coordinates(3)
    assert Augmentation()(images) is images


@pytest.mark.parametrize(("option", "axis"), [("flip", -1), ("flip_vertical", -2)])
def test_half_of_the_images_are_mirrored(option: str, axis: int) -> None:
    torch.manual_seed(0)
    images = _coordinates(200)
    result = Augmentation(**{option: True})(images)
    flipped = (result != images).flatten(1).any(dim=1)
    assert 70 < flipped.sum() < 130
    assert torch.equal(result[flipped], images[flipped].flip(axis))


def test_shifts_are_by_whole_pixels_each_image_its_own() -> None:
    torch.manual_seed(0)
    images = _coordinates(300)
    result = Augmentation(shift=0.1)(images)
    moved = result[:, :, 10, 15] - images[:, :, 10, 15]
    torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-3)
    x, y = (set(part.round().int().tolist()) for part in moved.unbind(1))
    assert x == set(range(-3, 4))
    assert y == set(range(-2, 3))
    # What comes in repeats the border.
    assert result.min() > -1e-3
    torch.testing.assert_close(result[:, 0].amax(), torch.tensor(29.0), rtol=0, atol=1e-3)


def test_crops_lie_inside_and_are_enlarged() -> None:
    torch.manual_seed(0)
    result = Augmentation(crop=0.5)(_coordinates(300))
    extents = result.amax(dim=(2, 3)) - result.amin(dim=(2, 3)) + 1
    for extent, side in zip(extents.unbind(1), (30, 20), strict=True):
        assert side / 2 - 1 < extent.min() < side * 0.55
        assert side * 0.95 < extent.max() <= side + 1e-3
    torch.testing.assert_close(extents[:, 0] / 30, extents[:, 1] / 20, rtol=0, atol=0.06)


def test_the_same_seed_draws_the_same() -> None:
    augmentation = Augmentation(flip=True, shift=0.2, crop=0.7)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augmentation(_coordinates(8)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 0.6}, r"data\.augment\.shift=0\.6"),
        ({"crop": 0.0}, r"data\.augment\.crop=0\.0"),
        ({"crop": 2.0}, "crop"),
    ],
)
def test_impossible_augmentations(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)  # type: ignore[arg-type]
