"""Outputs and gradients of the ROI engine against the slow reference and against torch in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from engine_cases import (
    Case,
    assert_near,
    assert_same_results,
    cases,
    difference,
    engine_of,
    place_rois,
    results,
    targeted,
    truth,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tkn import TargetConv2d
from tkn.backends.cpu.kernels import Tiles, pack, unpack
from tkn.backends.cpu.rows import Rows
from tkn.backends.cpu.stage import Stage
from tkn.geometry import Geometry, Pool
from tkn.sequential import TargetSequential

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

SMALL = cases(40, 1, batches=(1, 3), large=False)
LARGE = cases(60, 2, batches=(1, 3, 16, 17, 33), large=True)
BATCHES = (1, 3, 16, 17, 31, 128)


def slow(case: Case, network: nn.Sequential, x: Tensor) -> Tensor:
    """The network, whose first layer is the case's, by tests/reference.py."""
    layer = network[0]
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    zeros = ((top, bottom), (left, right))
    if case.padding_mode != "zeros":
        x, zeros = F.pad(x, (left, right, top, bottom), mode=case.padding_mode), ((0, 0), (0, 0))
    y = reference.convolution(x, layer.weight, layer.bias, case.stride, zeros, case.dilation, case.groups)
    size = tuple(y.shape[2:])
    y = y * reference.window(size, layer.loc, layer.scale, case.attention, 0.5)
    if case.clip:
        mask = reference.roi_mask(size, layer.loc, layer.scale)
        assert case.rois != "pixel" or mask.flatten(1).sum(dim=1).eq(1).all()
        y = y * mask
    if case.relu:
        y = y * (y > 0)
    if case.pool is not None:
        kind, (height, width) = case.pool
        windows = y.unfold(2, height, height).unfold(3, width, width)
        y = windows.amax(dim=(4, 5)) if kind == "max" else windows.mean(dim=(4, 5))
    return y


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_layers_equal_the_slow_reference(case: Case) -> None:
    network = case.network(engine="roi", dtype=torch.float64)
    x = case.images(torch.float64)
    expected = slow(case, network, x)
    assert engine_of(network(x)) == "roi"
    assert_near(network(x), expected, 1e-12)
    assert_near(network.float()(x.float()), expected, 1e-5)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_layers_and_gradients_equal_float64(case: Case) -> None:
    network = case.network(engine="roi")
    assert engine_of(network(case.images())) == "roi"
    assert_same_results(network, case.images())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rois", ["random", pytest.param("edge", marks=pytest.mark.compact)])
def test_every_batch_size(batch: int, rois: str) -> None:
    torch.manual_seed(batch)
    network = TargetSequential(TargetConv2d(5, 19, 3, padding=1, engine="roi"), nn.ReLU(), nn.MaxPool2d(2))
    place_rois(network[0], rois, (9, 7), batch)
    x = torch.randn(batch, 5, 9, 7)
    assert_same_results(network, x)
    assert_same_results(network.double(), x.double(), 1e-12)
    if rois == "edge":  # the last row and column are in no window of the pooling
        assert network(x.double()).eq(0).all()


CHAINS: dict[str, Callable[[], nn.Sequential]] = {
    "three layers": lambda: TargetSequential(
        TargetConv2d(1, 20, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        TargetConv2d(20, 24, 5, padding=2, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        TargetConv2d(24, 10, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(90, 4),
    ),
    "no activation": lambda: TargetSequential(TargetConv2d(3, 7, 3), TargetConv2d(7, 5, 3, stride=2)),
    "mean pooling": lambda: TargetSequential(
        TargetConv2d(3, 8, 3, padding=1), nn.AvgPool2d(2), TargetConv2d(8, 17, (3, 1), padding="same"), nn.AvgPool2d(3)
    ),
    "groups": lambda: TargetSequential(
        TargetConv2d(4, 16, 3, padding=1, groups=2), nn.ReLU(), TargetConv2d(16, 32, 3, padding=1, groups=16), nn.ReLU()
    ),
    "plain layers between": lambda: TargetSequential(
        TargetConv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        TargetConv2d(8, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    ),
    "overlapping pooling": lambda: TargetSequential(
        TargetConv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), TargetConv2d(8, 4, 3), nn.AvgPool2d(2, 1)
    ),
    "without clipping": lambda: TargetSequential(
        TargetConv2d(3, 8, 3, padding=1, clip=False), nn.ReLU(), TargetConv2d(8, 4, 3, dilation=2)
    ),
    "other padding": lambda: TargetSequential(
        TargetConv2d(3, 8, 3, padding=1), nn.ReLU(), TargetConv2d(8, 4, 3, padding=1, padding_mode="reflect")
    ),
    "many inputs": lambda: TargetSequential(
        TargetConv2d(2, 150, 3, padding=1), nn.ReLU(), TargetConv2d(150, 6, 5, padding=2)
    ),
}


@pytest.mark.parametrize("batch", [1, 3, pytest.param(17, marks=pytest.mark.compact), 40])
@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_layers(name: str, batch: int) -> None:
    """Layers that know where the ROIs of the layer before lie."""
    torch.manual_seed(0)
    network = targeted(CHAINS[name](), seed=1, engine="roi").eval()
    first = next(module for module in network if isinstance(module, TargetConv2d))
    assert_same_results(network, torch.randn(batch, first.in_channels, 13, 13))


@pytest.mark.parametrize("batch", [1, 37])
def test_a_chain_whose_first_layer_is_dead(batch: int) -> None:
    torch.manual_seed(0)
    network = TargetSequential(
        TargetConv2d(3, 8, 3, padding=1, engine="roi"),
        nn.MaxPool2d(2),
        TargetConv2d(8, 4, 3, padding=1, engine="roi"),
    )
    place_rois(network[0], "edge", (5, 5), 0)
    x = torch.randn(batch, 3, 5, 5)
    assert network[2].bias.abs().min() > 0
    assert_same_results(network, x)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("pool", [None, Pool((2, 2)), Pool((2, 1), average=True)], ids=["none", "max", "average"])
@pytest.mark.parametrize("channels", [3, 20])
def test_inputs_known_to_be_zero(batch: int, pool: Pool | None, channels: int) -> None:
    torch.manual_seed(batch)
    known = torch.rand(channels, 8, 9) < 0.4
    known[:, 2, 3] = False  # a pixel without any
    known[:, 5, 5] = True
    mask = torch.rand(18, 8, 9) < 0.5
    x = torch.randn(batch, channels, 8, 9) * known
    weight, bias, window = torch.randn(18, channels, 3, 3), torch.randn(18), torch.rand(18, 8, 9)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias, window)]
    expected = F.relu(F.conv2d(*inputs[:3], padding=1) * inputs[3] * mask)
    if pool is not None:
        expected = (F.avg_pool2d if pool.average else F.max_pool2d)(expected, pool.kernel)
    tiles, rows = Tiles.of(batch, x.dtype), Rows.of(known.numpy())
    geometry = Geometry((8, 9), (3, 3), (1, 1), (1, 1), (1, 1))
    stage = Stage(rows, mask.numpy(), geometry, 1, True, pool, tiles, x.dtype)
    data = pack(x, rows, tiles)
    computed = stage.forward(data, weight, bias, window)
    assert_near(unpack(computed.output, stage.output, batch), expected)
    downstream = torch.randn(expected.shape)
    ours = stage.backward(pack(downstream, stage.output, tiles), data, weight, computed, (True,) * 4)
    theirs = torch.autograd.grad(expected, inputs, downstream.double())
    assert_near(unpack(ours.x, rows, batch), theirs[0] * known)
    for one, other in zip((ours.weight, ours.bias, ours.window), theirs[1:], strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_packing_and_unpacking_give_back_the_batch(batch: int, channels_last: bool, dtype: torch.dtype) -> None:
    mask = np.random.default_rng(0).random((19, 5, 18)) < 0.5
    x = torch.randn(batch, 19, 5, 18, generator=torch.Generator().manual_seed(0)).to(dtype)
    tiles = Tiles.of(batch, torch.float32)
    rows = Rows.of(mask)
    packed = pack(x, rows, tiles)
    returned = unpack(packed, rows, batch, channels_last=channels_last)
    assert torch.equal(returned, x * torch.from_numpy(mask))
    assert returned.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    beyond = packed.permute(0, 2, 1).flatten(0, 1)[batch:][:, rows.row.astype(np.int64)]
    assert beyond.eq(0).all()


GRADCHECKS = {
    "few inputs": {"args": (2, 3, 3), "kwargs": {"padding": 1}},
    "many inputs": {"args": (9, 2, 2), "kwargs": {"bias": False}},
    "groups, stride, dilation": {"args": (4, 4, 2), "kwargs": {"groups": 2, "stride": (1, 2), "dilation": (2, 1)}},
    "soft": {"args": (2, 3, 3), "kwargs": {"padding": "same", "clip": False, "attention": "gaussian"}},
}


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name: str, batch: int) -> None:
    """Of the input, weight, bias, loc and scale."""
    torch.manual_seed(0)
    layer = TargetConv2d(*GRADCHECKS[name]["args"], dtype=torch.float64, engine="roi", **GRADCHECKS[name]["kwargs"])
    targeted(layer, seed=3)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(batch, layer.in_channels, 4, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert engine_of(layer(x)) == "roi"
    assert torch.autograd.gradcheck(function, (x, *layer.parameters()), fast_mode=batch > 1)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2)], ids=["max", "average"])
@pytest.mark.parametrize("batch", [2, 9])
def test_gradcheck_of_a_chain(pool: nn.Module, batch: int) -> None:
    torch.manual_seed(1)
    network = TargetSequential(
        TargetConv2d(2, 3, 3, padding=1), nn.ReLU(), pool, TargetConv2d(3, 2, 2), nn.ReLU(), nn.MaxPool2d((1, 2))
    )
    targeted(network.double(), seed=1, engine="roi")
    names = [name for name, _ in network.named_parameters()]
    x = torch.randn(batch, 2, 6, 6, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(network, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(function, (x, *network.parameters()), fast_mode=True)


@pytest.mark.parametrize("frozen", ["weight", "bias", "loc", "scale", "input", "all but input", "all but weight"])
def test_only_the_gradients_that_are_wanted(frozen: str) -> None:
    torch.manual_seed(0)
    layer = targeted(TargetConv2d(3, 20, 3, padding=1, engine="roi"), seed=2)
    x = torch.randn(5, 3, 8, 8, requires_grad=frozen not in ("input", "all but weight"))
    for name, parameter in layer.named_parameters():
        kept = frozen.removeprefix("all but ")
        parameter.requires_grad_(name == kept if frozen != kept else name != kept)
    other = truth(layer)
    other_x = x.detach().double().requires_grad_(x.requires_grad)
    layer(x).square().sum().backward()
    other(other_x).square().sum().backward()
    for ours, theirs in zip((x, *layer.parameters()), (other_x, *other.parameters()), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert_near(ours.grad, theirs.grad)


def test_the_first_of_equal_maxima_gets_the_gradient() -> None:
    network = TargetSequential(TargetConv2d(1, 1, 1, bias=False, engine="roi"), nn.MaxPool2d(2))
    nn.init.constant_(network[0].scale, torch.inf)  # a flat window
    x = torch.ones(1, 1, 4, 4)
    ours, theirs = results(network, x), results(truth(network), x.double())
    assert difference(ours[1], theirs[1]) < 1e-6


def test_nan_and_infinity_stay_in_their_image() -> None:
    torch.manual_seed(0)
    network = targeted(
        TargetSequential(
            TargetConv2d(3, 20, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), TargetConv2d(20, 6, 3, padding=1), nn.ReLU()
        ),
        seed=1,
        engine="roi",
    )
    x = torch.randn(20, 3, 10, 10)
    clean = network(x)
    x[4, 1, 3, 6] = torch.nan
    x[7, 0, 2, 2] = torch.inf
    y = network(x)
    assert y[4].isnan().any()
    rest = [image for image in range(20) if image not in (4, 7)]
    assert torch.equal(y[rest], clean[rest])
    # Inside the ROIs what torch computes, where its own zeros outside (NaN * 0) did not spread.
    alone = network[:1]
    inside = alone[0].window((10, 10)) * 0 == 0
    size = (10, 10)
    mask = torch.zeros(20, *size, dtype=torch.bool)
    for channel, ((top, bottom), (left, right)) in enumerate(alone[0].rois(size).tolist()):
        mask[channel, top:bottom, left:right] = True
    expected = truth(alone)(x.double())
    actual = alone(x)
    assert inside.all()
    wanted = torch.where(mask, expected, 0.0)
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
