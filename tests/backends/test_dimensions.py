"""Target layers of one and three dimensions inside their ROIs, against the slow reference and torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import reference
import torch
from as_function import as_function
from engine_cases import (
    ROIS,
    assert_near,
    assert_same_results,
    difference,
    engine_of,
    place_rois,
    results,
    targeted,
    truth,
    with_engine,
)
from torch import Tensor, nn

from tkn import TargetConv1d, TargetConv3d, targetize
from tkn.backends.cpu.chain import Chain
from tkn.backends.cpu.kernels import Tiles, pack, unpack
from tkn.backends.cpu.rows import Rows
from tkn.sequential import TargetSequential

#: Of (kernel, stride, padding, dilation, groups), by dimensions.
GEOMETRIES: dict[int, list[tuple[Any, ...]]] = {
    1: [
        *product([(1,), (2,), (5,)], [(1,), (3,)], [0, 2], [(1,), (2,)], [1]),
        *product([(3,)], [(1,), (2,)], [0, 1], [(1,), (3,)], [1, 2, 4]),
        ((4,), (1,), "same", (1,), 2),
    ],
    3: [
        *product([(1, 1, 1), (3, 3, 3)], [(1, 1, 1), (2, 1, 2)], [0, 1], [(1, 1, 1)], [1, 4]),
        *product([(2, 3, 1)], [(1, 1, 1), (1, 2, 1)], [0, (1, 0, 1)], [(1, 1, 1), (2, 1, 1)], [1, 2]),
        ((2, 2, 3), (1, 1, 1), "same", (1, 1, 1), 1),
    ],
}
SIZES = {1: (13,), 3: (5, 4, 6)}
LAYERS = {1: TargetConv1d, 3: TargetConv3d}
OF_EVEN_KERNELS = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def made(dims: int, number: int, rois: str, channels: tuple[int, int], **options: Any) -> nn.Module:
    kernel, stride, padding, dilation, groups = GEOMETRIES[dims][number]
    torch.manual_seed(number)
    layer = LAYERS[dims](*channels, kernel, stride, padding, dilation, groups, engine="roi", **options)
    place_rois(layer, rois, tuple(layer.target().output_size(SIZES[dims])), number)
    return layer


def images(dims: int, batch: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, channels, *SIZES[dims], generator=torch.Generator().manual_seed(batch), dtype=dtype)


def slow(layer: Any, x: Tensor) -> Tensor:
    spec = layer.target().spec
    y = reference.convolution(x, layer.weight, layer.bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    size = tuple(y.shape[2:])
    y = y * reference.window(size, layer.loc, layer.scale, layer.attention, layer.scale_unit)
    return y * reference.roi_mask(size, layer.loc, layer.scale)


NUMBERED = [(dims, number) for dims, geometries in GEOMETRIES.items() for number in range(len(geometries))]


@OF_EVEN_KERNELS
@pytest.mark.parametrize(("dims", "number"), NUMBERED)
def test_layers_equal_the_slow_reference(dims: int, number: int) -> None:
    layer = made(dims, number, ROIS[number % len(ROIS)], (4, 8), dtype=torch.float64)
    x = images(dims, 1 + number % 3, 4, torch.float64)
    y = layer(x)
    assert engine_of(y) == "roi"
    expected = slow(layer, x)
    assert_near(y, expected, 1e-12)
    assert_near(layer.float()(x.float()), expected, 1e-5)


@OF_EVEN_KERNELS
@pytest.mark.parametrize(("dims", "number"), NUMBERED)
def test_gradients_equal_float64(dims: int, number: int) -> None:
    """Of the input, weight, bias, loc and scale, with few channels and with many."""
    channels = ((4, 20), (24, 36), (4, 4))[number % 3]
    attention = ("cauchy", "gaussian", "flat")[number // 2 % 3]
    layer = made(dims, number, ROIS[number % len(ROIS)], channels, attention=attention, bias=number % 4 > 0)
    assert_same_results(layer, images(dims, (1, 3, 17, 33)[number % 4], channels[0]))


CHAINS: dict[str, Callable[[], nn.Sequential]] = {
    "one dimension": lambda: TargetSequential(
        TargetConv1d(4, 20, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool1d(2),
        TargetConv1d(20, 8, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.AvgPool1d(3),
        TargetConv1d(8, 6, 2),
    ),
    "three dimensions": lambda: TargetSequential(
        TargetConv3d(4, 18, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool3d((1, 2, 2)),
        TargetConv3d(18, 8, (3, 1, 3), padding=(1, 0, 1), bias=False),
        nn.AvgPool3d((2, 1, 1)),
        TargetConv3d(8, 6, 1),
    ),
}


@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("name", CHAINS)
def test_sequences(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of one is one operation."""
    lengths: list[int] = []
    forward = Chain.forward
    monkeypatch.setattr(
        Chain, "forward", lambda self, *args: (lengths.append(len(self.targets)), forward(self, *args))[1]
    )
    torch.manual_seed(0)
    network = targeted(CHAINS[name](), seed=1, engine="roi")
    x = images(network[0].num_dims, batch, 4)
    assert_same_results(network, x)
    assert lengths == [3]


@pytest.mark.parametrize("dims", [1, 3])
def test_under_autocast(dims: int) -> None:
    torch.manual_seed(0)
    name = "one dimension" if dims == 1 else "three dimensions"
    network, x = targeted(CHAINS[name](), seed=1, engine="roi"), images(dims, 5, 4)
    expected = results(truth(network), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = results(network, x), results(with_engine(network, "dense"), x)
    for one, other, right in zip(ours, theirs, expected, strict=True):
        assert one.dtype == other.dtype
        assert difference(one, right) <= 2 * difference(other, right) + 1e-3


@pytest.mark.parametrize("dims", [1, 3])
def test_gradcheck(dims: int) -> None:
    torch.manual_seed(0)
    layer = targeted(LAYERS[dims](2, 3, 2, padding=1, engine="roi", dtype=torch.float64), seed=3)
    x = torch.randn(2, 2, *(4, 3, 3)[:dims], dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(as_function(layer), (x, *layer.parameters()), fast_mode=True)


LAYOUTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "channels after the length": (1, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "every other pixel": (1, lambda x: x.repeat_interleave(2, dim=2)[..., ::2]),
    "channels last": (3, lambda x: x.contiguous(memory_format=torch.channels_last_3d)),
    "axes exchanged": (3, lambda x: x.transpose(2, 4).contiguous().transpose(2, 4)),
    "depth between": (3, lambda x: x.repeat_interleave(2, dim=3)[..., ::2, :]),
    "one image for all": (3, lambda x: x[:1].expand(len(x), -1, -1, -1, -1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_inputs_of_any_layout(name: str) -> None:
    dims, lay_out = LAYOUTS[name]
    network = targeted(TargetSequential(made(dims, 0, "random", (4, 18)), nn.ReLU()), seed=2)
    x = lay_out(images(dims, 5, 4))
    assert not x.is_contiguous()
    assert_same_results(network, x)


@pytest.mark.parametrize("dims", [1, 3])
def test_packing_and_unpacking_give_back_the_batch(dims: int) -> None:
    mask = np.random.default_rng(0).random((19, *SIZES[dims])) < 0.5
    x = images(dims, 17, 19)
    rows, tiles = Rows.of(mask), Tiles.of(17, torch.float32)
    assert torch.equal(unpack(pack(x, rows, tiles), rows, 17), x * torch.from_numpy(mask))


@pytest.mark.parametrize("dims", [1, 3])
def test_a_converted_network_trains_inside_its_rois(dims: int) -> None:
    torch.manual_seed(0)
    conv, pool = (nn.Conv1d, nn.MaxPool1d) if dims == 1 else (nn.Conv3d, nn.MaxPool3d)
    plain = nn.Sequential(conv(4, 8, 3, padding=1), nn.ReLU(), pool(2), conv(8, 4, 3, padding=1), nn.ReLU())
    network = targeted(targetize(plain, engine="roi"), seed=1)
    assert isinstance(network, TargetSequential)
    assert_same_results(network, images(dims, 4, 4))
