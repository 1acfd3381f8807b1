"""The scale penalty in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tkn import AttentiveRegularization1d, TargetConv2d, build_model, scale_penalty
from tkn.layers import roi_layers

#: channels of the target layers in blocks 0, 1, 2
CHANNELS = {"tkn6": (256, 256, 128), "tdn10": (24, 24, 24)}


@pytest.fixture(scope="module", params=CHANNELS)
def network(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, build_model(request.param, (1, 8, 8), 2)


@pytest.mark.parametrize("beta", [1.0, 4.0, 0.5, 0.0])
def test_closed_form_at_the_start(network: tuple[str, nn.Module], beta: float) -> None:
    """Every scale is 1: two axes times the kernels of each block."""
    name, model = network
    expected = 5e-4 * 2 * sum(channels * beta**block for block, channels in enumerate(CHANNELS[name]))
    assert scale_penalty(model, 5e-4, beta).item() == pytest.approx(expected, rel=1e-6)


def test_closed_form_and_gradient_of_random_scales(network: tuple[str, nn.Module]) -> None:
    _, model = network
    torch.manual_seed(0)
    layers = roi_layers(model).values()
    scales = [torch.rand_like(layer.scale) for layer in layers]
    model.zero_grad()
    with torch.no_grad():
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale.copy_(scale)
    penalty = scale_penalty(model, 1e-3, 4.0)
    penalty.backward()
    squares = [
        4.0**layer.block * sum(s**2 for row in scale.tolist() for s in row)
        for layer, scale in zip(layers, scales, strict=True)
    ]
    assert penalty.item() == pytest.approx(1e-3 * sum(squares), rel=1e-5)
    for layer, scale in zip(layers, scales, strict=True):
        torch.testing.assert_close(layer.scale.grad, 2 * 1e-3 * 4.0**layer.block * scale)
        layer.reset_attention()
    others = [p for name, p in model.named_parameters() if not name.endswith("scale")]
    assert all(p.grad is None for p in others)


def test_beta_is_one_by_default() -> None:
    model = nn.Sequential(TargetConv2d(1, 3, 3, block=2), AttentiveRegularization1d(5, block=1))
    assert scale_penalty(model, 2.0).item() == 2 * (2 * 3 + 5)


def test_zero_without_roi_layers() -> None:
    penalty = scale_penalty(build_model("dn10", (1, 8, 8), 2), 1.0, 4.0)
    assert penalty.item() == 0
    assert penalty.shape == ()


@pytest.mark.parametrize(("l2", "beta"), [(-1e-4, 1.0), (1e-4, -2.0)])
def test_negative_factors(l2: float, beta: float) -> None:
    with pytest.raises(ValueError, match=rf"l2={l2} and beta={beta} .* must not be negative"):
        scale_penalty(nn.Identity(), l2, beta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_sum_is_of_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(TargetConv2d(1, 999, 3, dtype=dtype), TargetConv2d(999, 1, 3, block=1))
    with torch.no_grad():
        for layer in model:
            layer.scale.uniform_()
    penalty = scale_penalty(model, 1e-3, 2.0)
    assert penalty.dtype == torch.float32
    squares = [layer.scale.detach().double().square().sum().item() for layer in model]
    assert penalty.item() == pytest.approx(1e-3 * (squares[0] + 2 * squares[1]), rel=1e-5)
    penalty.backward()
    assert model[0].scale.grad.dtype == dtype
    torch.testing.assert_close(model[0].scale.grad, 2e-3 * model[0].scale.detach())


@pytest.mark.parametrize("make", [lambda: TargetConv2d(1, 3, 3), lambda: nn.Conv2d(1, 3, 3)], ids=["target", "dense"])
@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_without_values(make: Callable[[], nn.Module], mode: Callable[[], Any]) -> None:
    with mode():
        model = make()
        penalty = scale_penalty(model, 1.0)
    assert penalty.shape == ()
    assert penalty.device == next(model.parameters()).device


@pytest.mark.parametrize("make", [lambda: TargetConv2d(1, 3, 3), lambda: nn.Conv2d(1, 3, 3)], ids=["target", "dense"])
def test_the_penalty_is_where_the_model_is(make: Callable[[], nn.Module]) -> None:
    model = make()
    expected = scale_penalty(model, 1.0)
    with torch.device("meta"):
        penalty = scale_penalty(model, 1.0)
    assert torch.equal(penalty, expected)
