"""Attention windows: closed values, resolution independence, separability, correlation."""

from __future__ import annotations

from math import exp, sqrt

import pytest
import torch
from reference import window as slow_window
from torch import Tensor

from tkn.attention import (
    ATTENTION,
    attention_function,
    attention_slope,
    cauchy,
    correlated_gaussian_window,
    flat,
    gaussian,
    pixel_centres,
    separable_window,
)

FUNCTIONS = {"gaussian": gaussian, "cauchy": cauchy, "flat": flat}


def column(*values: float) -> Tensor:
    """Parameters [dims, 1] of one kernel."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def value_at(distance: float, scale: float, attention: str, scale_unit: float = 0.5) -> float:
    """The window at `distance` from its loc: a map of one pixel has its centre at 0.5."""
    return separable_window(
        (1,), column(0.5 - distance), column(scale), attention_function(attention), scale_unit
    ).item()


def random_attention(dims: int, channels: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dims)
    loc = torch.rand(dims, channels, generator=generator, dtype=torch.float64)
    return loc, 0.1 + torch.rand(dims, channels, generator=generator, dtype=torch.float64)


def test_names() -> None:
    assert ATTENTION == FUNCTIONS


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown attention 'gausian'; did you mean 'gaussian'\?"):
        attention_function("gausian")


@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-3])
@pytest.mark.parametrize(("attention", "at_edge"), [("gaussian", exp(-1)), ("cauchy", 1 / 3), ("flat", 0)])
def test_centre_is_one_and_edge_of_the_roi_closed(attention: str, at_edge: float, scale: float) -> None:
    assert value_at(0, scale, attention) == 1
    assert value_at(scale / sqrt(2), scale, attention) == pytest.approx(at_edge, rel=1e-12, abs=1e-12)
    assert value_at(-scale / sqrt(2), scale, attention) == pytest.approx(at_edge, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("attention", "scale_unit", "expected"),
    [
        ("gaussian", 0.5, exp(-1 / 2)),  # f(sigma = 1), the paper's sentence
        ("cauchy", 0.5, 1 / 2),
        ("gaussian", 1.0, exp(-1 / 8)),  # Eqs. 10-12 to the letter
        ("cauchy", 1.0, 4 / 5),
    ],
)
def test_image_border_at_the_start(attention: str, scale_unit: float, expected: float) -> None:
    assert value_at(0.5, 1.0, attention, scale_unit) == pytest.approx(expected, rel=1e-12)
    fine = separable_window((10_000,), column(0.5), column(1.0), FUNCTIONS[attention], scale_unit)[0]
    assert fine[0].item() == pytest.approx(expected, rel=1e-3)
    assert torch.allclose(fine, fine.flip(0), rtol=1e-12, atol=0)
    assert fine[:5_000].diff().min() > 0


@pytest.mark.parametrize("attention", FUNCTIONS)
def test_infinite_scale_is_flat(attention: str) -> None:
    window = separable_window((5, 6), column(0.2, 0.9), column(torch.inf, torch.inf), FUNCTIONS[attention], 0.5)
    assert torch.equal(window, torch.ones(1, 5, 6, dtype=torch.float64))


def test_pixel_centres() -> None:
    assert pixel_centres(4, torch.zeros((), dtype=torch.float64)).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert pixel_centres(3, torch.zeros(())).dtype == torch.float32


@pytest.mark.parametrize("attention", FUNCTIONS)
def test_resolution_independent(attention: str) -> None:
    """Every pixel of a map is the middle one of three in a map three times as fine."""
    loc, scale = random_attention(2)
    coarse = separable_window((5, 8), loc, scale, FUNCTIONS[attention], 0.5)
    fine = separable_window((15, 24), loc, scale, FUNCTIONS[attention], 0.5)
    torch.testing.assert_close(fine[:, 1::3, 1::3], coarse, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("attention", FUNCTIONS)
@pytest.mark.parametrize("size", [(7,), (6, 5), (3, 4, 5)])
@pytest.mark.parametrize("scale_unit", [0.5, 1.0, 0.3])
def test_equals_the_reference(attention: str, size: tuple[int, ...], scale_unit: float) -> None:
    loc, scale = random_attention(len(size))
    window = separable_window(size, loc, scale, FUNCTIONS[attention], scale_unit)
    torch.testing.assert_close(window, slow_window(size, loc, scale, attention, scale_unit), rtol=1e-12, atol=0)


@pytest.mark.parametrize("attention", FUNCTIONS)
def test_separable_is_the_outer_product_of_the_axes(attention: str) -> None:
    loc, scale = random_attention(3)
    function = FUNCTIONS[attention]
    depth, rows, columns = (
        separable_window((n,), loc[[axis]], scale[[axis]], function, 0.5) for axis, n in enumerate((3, 4, 5))
    )
    expected = torch.einsum("cd,ch,cw->cdhw", depth, rows, columns)
    torch.testing.assert_close(separable_window((3, 4, 5), loc, scale, function, 0.5), expected, rtol=1e-12, atol=0)


def test_without_correlation_the_bivariate_gaussian_is_separable() -> None:
    loc, scale = random_attention(2)
    correlated = correlated_gaussian_window((6, 9), loc, scale, torch.zeros(4, dtype=torch.float64), 0.5)
    torch.testing.assert_close(correlated, separable_window((6, 9), loc, scale, gaussian, 0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rho", [-0.9, -0.3, 0.5, 0.99])
@pytest.mark.parametrize(("row", "column_"), [(0, 0), (2, 5), (5, 1)])
def test_correlated_formula(rho: float, row: int, column_: int) -> None:
    """exp(-alpha / 2) with the alpha of Eq. 5."""
    loc, scale = column(0.4, 0.7), column(0.6, 0.9)
    window = correlated_gaussian_window((6, 8), loc, scale, torch.tensor([rho], dtype=torch.float64), 0.5)
    fx, fy = ((row + 0.5) / 6 - 0.4) / 0.3, ((column_ + 0.5) / 8 - 0.7) / 0.45
    alpha = fx**2 - 2 * rho * fx * fy + fy**2
    assert window[0, row, column_].item() == pytest.approx(exp(-alpha / 2), rel=1e-12)
    assert window.max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_windows_of_float32(dtype: torch.dtype) -> None:
    """On maps so large that neighbouring pixels have the same coordinate in half precision."""
    generator = torch.Generator().manual_seed(0)
    loc, scale = torch.rand(2, 5, generator=generator).to(dtype), torch.full((2, 5), 0.05, dtype=dtype)
    rho = torch.tensor([-0.5, 0.0, 0.2, 0.4, 0.9], dtype=dtype)
    for function in FUNCTIONS.values():
        window = separable_window((224, 300), loc, scale, function, 0.5)
        assert window.dtype == torch.float32
        expected = separable_window((224, 300), loc.double(), scale.double(), function, 0.5)
        torch.testing.assert_close(window.double(), expected, rtol=0, atol=2e-5)
    window = correlated_gaussian_window((224, 300), loc, scale, rho, 0.5)
    assert window.dtype == torch.float32
    expected = correlated_gaussian_window((224, 300), loc.double(), scale.double(), rho.double(), 0.5)
    torch.testing.assert_close(window.double(), expected, rtol=0, atol=2e-5)


def test_half_precision_parameters_have_gradients_of_their_own_type() -> None:
    loc, scale = column(0.4, 0.7).bfloat16().requires_grad_(), column(0.3, 0.2).bfloat16().requires_grad_()
    wide = [parameter.detach().double().requires_grad_() for parameter in (loc, scale)]
    separable_window((40, 50), loc, scale, gaussian, 0.5).square().sum().backward()
    separable_window((40, 50), *wide, gaussian, 0.5).square().sum().backward()
    for parameter, reference in zip((loc, scale), wide, strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad.bfloat16(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_flat_is_exactly_one_on_the_whole_map_at_the_start(dtype: torch.dtype) -> None:
    loc, scale = torch.full((2, 1), 0.5, dtype=dtype), torch.ones(2, 1, dtype=dtype)
    for size in [(1, 1), (2, 3), (7, 224), (1023, 5)]:
        assert separable_window(size, loc, scale, flat, 0.5).eq(1).all()


def test_flat_falls_from_one_to_zero_at_the_edge_of_the_roi() -> None:
    """1 up to 0.5 scale from loc; half at the middle of the fall, which ends at scale / sqrt 2."""
    middle = (0.5 + 1 / sqrt(2)) / 2
    for distance, expected in [(0.5, 1), (middle, 0.5), (1 / sqrt(2), 0), (2, 0)]:
        assert value_at(0.3 * distance, 0.3, "flat") == pytest.approx(expected, abs=1e-12)
        assert value_at(-0.3 * distance, 0.3, "flat") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("attention", FUNCTIONS)
def test_slopes_are_the_functions_derivatives(attention: str) -> None:
    z = torch.linspace(-2, 2, 1001, dtype=torch.float64).requires_grad_()
    value = FUNCTIONS[attention](z)
    (expected,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(attention_slope(attention, z.detach(), value.detach()), expected)
    assert torch.isfinite(expected).all()
