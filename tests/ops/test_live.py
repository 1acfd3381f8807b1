"""A fully connected layer that reads only what ROIs reach, against torch's whole one in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_cases import assert_near, place_rois
from torch import Tensor, nn

import tkn.sequential
from tkn import TargetConv2d
from tkn.sequential import TargetSequential

SIZE = (12, 9)


def network(pool: nn.Module | None, rois: str, seed: int = 0) -> TargetSequential:
    """Two target layers, the second with ROIs of few pixels, and two fully connected ones; in float64."""
    torch.manual_seed(seed)
    first, second = TargetConv2d(2, 6, 3, padding=1), TargetConv2d(6, 5, 3, padding=1)
    place_rois(first, "random", SIZE, seed)
    place_rois(second, rois, SIZE, seed + 1)
    if rois == "random":
        with torch.no_grad():
            second.scale.mul_(0.5)
    pooled = [] if pool is None else [pool]
    inputs = 5 * (SIZE[0] * SIZE[1] if pool is None else (SIZE[0] // 2) * (SIZE[1] // 3))
    after = [nn.Flatten(), nn.Linear(inputs, 7), nn.ReLU(), nn.Linear(7, 3)]
    return TargetSequential(first, nn.ReLU(), second, nn.ReLU(), *pooled, *after).double()


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The indices with which fully connected layers were computed."""
    seen: list[Tensor] = []
    compute = tkn.sequential.linear_of_live

    def remembered(x: Tensor, live: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(live)
        return compute(x, live, weight, bias)

    monkeypatch.setattr(tkn.sequential, "linear_of_live", remembered)
    return seen


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and all parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    found = [x.grad, *(parameter.grad for parameter in model.parameters())]
    assert all(grad is not None for grad in found)
    return [y, *(grad for grad in found if grad is not None)]


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("rois", ["random", "pixel", "edge"])
@pytest.mark.parametrize("pool", [None, nn.MaxPool2d((2, 3)), nn.AvgPool2d((2, 3))], ids=["none", "max", "average"])
@pytest.mark.parametrize("engine", ["roi", "auto"])
def test_equal_to_the_whole_layer(
    engine: str, pool: nn.Module | None, rois: str, batch: int, joined: list[Tensor]
) -> None:
    model = network(pool, rois)
    whole = copy.deepcopy(model)
    for ours, theirs in zip(model, whole, strict=True):
        if isinstance(ours, TargetConv2d):
            ours.engine, theirs.engine = engine, "dense"
    x = torch.randn(batch, 2, *SIZE, dtype=torch.float64)
    expected = results(whole, x)
    assert not joined
    found = results(model, x)
    (live,) = joined
    reached = whole[: 5 if pool is not None else 4](x).flatten(1)
    assert not reached[:, ~torch.isin(torch.arange(reached.shape[1]), live)].any()
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, 1e-12)


def test_moved_rois_are_seen(joined: list[Tensor]) -> None:
    model = network(None, "random")
    x = torch.randn(3, 2, *SIZE, dtype=torch.float64)
    model(x)
    place_rois(model[2], "edge", SIZE, 0)
    found = model(x)
    assert [len(live) for live in joined][1] == 5
    whole = nn.Sequential(*model)
    assert_near(found, whole(x), 1e-12)


def test_gradients_of_gradients(joined: list[Tensor]) -> None:
    model = network(nn.MaxPool2d((2, 3)), "pixel")
    x = torch.randn(2, 2, *SIZE, dtype=torch.float64, requires_grad=True)
    weights = (model[6].weight, model[6].bias)
    assert torch.autograd.gradgradcheck(lambda x, *_: model(x), (x, *weights))
    assert joined


@pytest.mark.parametrize("kind", ["flatten", "linear", "full", "dense", "one image"])
def test_computed_whole(kind: str, joined: list[Tensor]) -> None:
    model = network(None, "full" if kind == "full" else "pixel")
    seen: list[torch.Size] = []
    x = torch.randn(2, 2, *SIZE, dtype=torch.float64)
    if kind == "flatten":
        model[4].register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    if kind == "linear":
        model[5].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape))
    if kind == "dense":
        model[0].engine = model[2].engine = "dense"
    if kind == "one image":
        model[4], x = nn.Flatten(0), x[0]
    model(x)
    assert not joined
    assert seen == ([(2, 5 * SIZE[0] * SIZE[1])] if kind in ("flatten", "linear") else [])


def of_small_rois(pixels: int) -> TargetSequential:
    """For maps of so many pixels."""
    conv = TargetConv2d(1, 8, 3, padding=1, engine="roi")
    with torch.no_grad():
        conv.loc.fill_(0.3)
        conv.scale.fill_(0.1)
    return TargetSequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(8 * pixels, 5))


def test_images_of_another_size_are_refused() -> None:
    model = of_small_rois(196)
    for side in (12, 15):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(torch.randn(2, 1, side, side))


def test_a_layer_with_a_forward_of_its_own() -> None:
    model = of_small_rois(36)
    model[3].forward = lambda x: x.new_zeros(len(x), 5)
    assert not model(torch.randn(2, 1, 6, 6)).any()
