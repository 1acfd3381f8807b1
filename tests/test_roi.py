"""ROIs against the pixel loop, and the projection's promises over many random cases."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from reference import roi_mask as slow_mask
from torch import Tensor

from tkn.roi import project_, roi_areas, roi_bounds, roi_mask

SIZES = [(1,), (9,), (28,), (5, 5), (7, 4), (6, 11), (3, 4, 5)]
#: (pixels along an axis, min_size)
MAPS = [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (7, 3), (14, 5), (28, 3), (56, 7), (333, 3), (1999, 3)]


def random_attention(dims: int, channels: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loc = torch.rand(dims, channels, generator=generator, dtype=dtype) * 1.4 - 0.2
    return loc, torch.rand(dims, channels, generator=generator, dtype=dtype) * 1.2


def on_pixel_centres(length: int, least: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ROIs [1, cases] both of whose bounds fall on pixel centres as far as `dtype` can say, and outside the map."""
    lo, side = torch.meshgrid(torch.arange(-2, length + 2), torch.arange(1, least + 2), indexing="ij")
    lo, side = lo.flatten().double(), side.flatten().double()
    loc, scale = (lo + 0.5 + side / 2) / length, side / (sqrt(2) * length)
    return loc[None].to(dtype), scale[None].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bounds_and_mask_equal_the_pixel_loop(size: tuple[int, ...], dtype: torch.dtype) -> None:
    loc, scale = random_attention(len(size), 40, dtype)
    rois = roi_bounds(size, loc, scale)
    mask = slow_mask(size, loc, scale).bool()
    assert rois.dtype == torch.int64
    assert rois.shape == (40, len(size), 2)
    assert torch.equal(roi_mask(size, rois), mask)
    assert torch.equal(roi_areas(rois), mask.flatten(1).sum(dim=1))


@pytest.mark.parametrize("length", [4, 7, 28])
def test_bounds_on_pixel_centres_equal_the_pixel_loop(length: int) -> None:
    loc, scale = on_pixel_centres(length, 3, torch.float32)
    mask = roi_mask((length,), roi_bounds((length,), loc, scale))
    assert torch.equal(mask, slow_mask((length,), loc, scale).bool())


@pytest.mark.parametrize(
    ("loc", "scale", "expected"),
    [
        (0.5, 1.0, [0, 10]),
        (0.5, 0.5, [1, 9]),  # 1.46 ... 8.54 pixels
        (0.5, 0.4, [2, 8]),  # 2.17 ... 7.83
        (0.0, 0.4, [0, 3]),  # -2.83 ... 2.83
        (1.0, 0.4, [7, 10]),
        (0.55, 0.01, [5, 6]),
        (0.5, 0.01, [5, 5]),  # between two centres
        (-3.0, 0.5, [0, 0]),
        (4.0, 0.5, [10, 10]),
    ],
)
def test_bounds_by_hand(loc: float, scale: float, expected: list[int]) -> None:
    bounds = roi_bounds((10,), torch.tensor([[loc]]), torch.tensor([[scale]]))
    assert bounds.tolist() == [[expected]]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale", [1.0, torch.inf])
def test_whole_map_at_the_start_and_with_infinite_scale(size: tuple[int, ...], scale: float) -> None:
    shape = len(size), 3
    rois = roi_bounds(size, torch.full(shape, 0.5), torch.full(shape, scale))
    assert rois.tolist() == [[[0, length] for length in size]] * 3


def test_infinite_scale_is_full_wherever_loc_is() -> None:
    loc = torch.tensor([[-2.0, 0.0, 0.3, 1.0, 5.0]])
    assert roi_bounds((6,), loc, torch.full_like(loc, torch.inf)).tolist() == [[[0, 6]]] * 5


def test_mask_of_known_rois() -> None:
    mask = roi_mask((3, 4), torch.tensor([[[0, 2], [1, 4]], [[1, 1], [0, 4]]]))
    assert mask[0].tolist() == [[False, True, True, True], [False, True, True, True], [False] * 4]
    assert not mask[1].any()
    assert roi_areas(torch.tensor([[[0, 2], [1, 4]], [[1, 1], [0, 4]]])).tolist() == [6, 0]


@pytest.mark.parametrize(
    ("length", "least", "dtype"),
    [
        (length, least, dtype)
        for length, least in MAPS
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    ],
)
def test_projection_keeps_its_promises(length: int, least: int, dtype: torch.dtype) -> None:
    """10,000 random loc and scale, far outside the limits too, and those whose bounds fall on pixel centres."""
    generator = torch.Generator().manual_seed(length)
    loc = torch.randn(1, 10_000, generator=generator, dtype=dtype) + 0.5
    scale = torch.rand(1, 10_000, generator=generator, dtype=dtype) * 3 - 0.5
    scale[:, ::3] = 0  # the smallest ROIs, everywhere
    tie_loc, tie_scale = on_pixel_centres(length, least, dtype)
    loc, scale = torch.cat((loc, tie_loc), dim=1), torch.cat((scale, tie_scale), dim=1)
    project_((length,), loc, scale, (least,))

    rois = roi_bounds((length,), loc, scale)
    assert rois.min() >= 0
    assert rois.max() <= length
    assert roi_areas(rois).min() >= least
    assert scale.min() >= least / (sqrt(2) * length)
    assert scale.max() <= 1
    once = loc.clone(), scale.clone()
    project_((length,), loc, scale, (least,))
    assert torch.equal(loc, once[0])
    assert torch.equal(scale, once[1])


def test_projection_limits_each_axis_by_its_own_length_and_min_size() -> None:
    loc, scale = torch.zeros(3, 2), torch.zeros(3, 2)
    project_((8, 10, 5), loc, scale, (3, 5, 1))
    bound = torch.tensor([3 / 8, 5 / 10, 1 / 5])[:, None].expand(3, 2) / sqrt(2)
    torch.testing.assert_close(scale, bound, rtol=2e-6, atol=0)
    torch.testing.assert_close(loc, bound / sqrt(2), rtol=2e-6, atol=0)  # the ROI begins at the map's border
    assert roi_bounds((8, 10, 5), loc, scale).tolist() == [[[0, 3], [0, 5], [0, 1]]] * 2


def test_loc_may_leave_the_map_while_enough_pixels_stay() -> None:
    """The limits of loc by hand: scale 1, 10 pixels, 3 of which must be inside."""
    loc, scale = torch.tensor([[-1.0, 2.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    project_((10,), loc, scale, (3,))
    assert loc[0].tolist() == pytest.approx([0.3 - 1 / sqrt(2), 0.7 + 1 / sqrt(2)])
    assert roi_bounds((10,), loc, scale).tolist() == [[[0, 3]], [[7, 10]]]


def test_valid_parameters_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    least = 3 / (sqrt(2) * 12) * (1 + 2e-6)
    scale = least + (1 - least) * torch.rand(2, 1_000, generator=generator)
    half = scale / sqrt(2)
    loc = torch.lerp(3 / 12 - half + 1e-6, 1 - 3 / 12 + half - 1e-6, torch.rand(2, 1_000, generator=generator))
    before = loc.clone(), scale.clone()
    project_((12, 12), loc, scale, (3, 3))
    assert torch.equal(loc, before[0])
    assert torch.equal(scale, before[1])


def test_the_bound_itself_grows_by_a_millionth() -> None:
    bound = 3 / (sqrt(2) * 12)
    loc, scale = torch.full((1, 1), 0.5, dtype=torch.float64), torch.full((1, 1), bound, dtype=torch.float64)
    project_((12,), loc, scale, (3,))
    assert scale.item() == pytest.approx(bound * (1 + 1e-6), rel=1e-12)
    assert loc.item() == 0.5


def test_projection_works_on_parameters() -> None:
    loc, scale = torch.nn.Parameter(torch.full((1, 1), 9.0)), torch.nn.Parameter(torch.full((1, 1), 9.0))
    project_((4,), loc, scale, (2,))
    assert scale.item() == 1
    assert loc.requires_grad
    assert scale.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_min_size_larger_than_the_map_is_the_map(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(3, 1_000, generator=generator, dtype=dtype)
    scale = torch.randn(3, 1_000, generator=generator, dtype=dtype)
    project_((8, 4, 1), loc, scale, (5, 5, 5))
    sides = roi_bounds((8, 4, 1), loc, scale).diff(dim=-1).squeeze(-1)
    assert sides.amin(dim=0).tolist() == [5, 4, 1]
    assert scale.max() <= 1


def test_nan_and_negative_scales_make_empty_rois() -> None:
    loc = torch.tensor([[0.5, torch.nan, 0.5, torch.nan, 0.5]])
    scale = torch.tensor([[0.5, 0.5, torch.nan, torch.nan, -0.5]])
    rois = roi_bounds((8,), loc, scale)
    assert roi_areas(rois).tolist() == [6, 0, 0, 0, 0]
    assert rois.min() >= 0
    assert rois.max() <= 8
    assert roi_mask((8,), rois).sum() == 6


def test_projection_hides_no_nan() -> None:
    loc, scale = torch.tensor([[torch.nan, 0.5, 0.4]]), torch.tensor([[0.5, torch.nan, -1.0]])
    project_((8,), loc, scale, (3,))
    assert loc.isnan().tolist() == [[True, True, False]]  # the limits of loc depend on scale
    assert scale.isnan().tolist() == [[False, True, False]]
    assert roi_areas(roi_bounds((8,), loc, scale)).tolist() == [0, 0, 3]
