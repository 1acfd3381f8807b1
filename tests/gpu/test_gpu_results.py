"""Outputs and gradients of the GPU's ROI engine against torch in float64, by the operator that users call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_cases import Case, assert_near, assert_same_results, cases, engine_of, place_rois, results, targeted, truth
from torch import nn

from tkn import TargetConv2d
from tkn.backends.cuda import stage
from tkn.sequential import TargetSequential

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = cases(24, 3, batches=(1, 3), large=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_and_gradients_equal_float64(case: Case, device: torch.device) -> None:
    network, x = case.network(engine="roi").to(device), case.images().to(device)
    assert engine_of(network(x)) == "roi"
    assert_same_results(network, x, 2e-5)


CHAINS: dict[str, Callable[[], nn.Sequential]] = {
    "pooled": lambda: TargetSequential(
        TargetConv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), TargetConv2d(6, 5, 3, padding=1), nn.ReLU()
    ),
    "no activation": lambda: TargetSequential(TargetConv2d(2, 3, 3), TargetConv2d(3, 2, 3, stride=2, bias=False)),
    "plain layers between": lambda: TargetSequential(
        TargetConv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), TargetConv2d(3, 2, 1)
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_layers(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    network = targeted(CHAINS[name](), seed=1, engine="roi").eval().to(device)
    first = next(module for module in network if isinstance(module, TargetConv2d))
    assert_same_results(network, torch.randn(2, first.in_channels, 7, 8).to(device), 2e-5)


def layer(inputs: int = 2, outputs: int = 5, **options: object) -> TargetConv2d:
    torch.manual_seed(0)
    made = TargetConv2d(inputs, outputs, 3, padding=1, engine="roi", **options)
    place_rois(made, "random", (6, 5), 0)
    return made


@pytest.mark.parametrize("batch", [1, 17, 40])
def test_every_batch_size_and_layout(batch: int, device: torch.device) -> None:
    network = layer().to(device)
    x = torch.randn(batch, 2, 6, 10).to(device)[..., ::2]
    assert_near(network(x), truth(network)(x.double()), 1e-5)
    network = network.to(memory_format=torch.channels_last)
    y = network(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_near(y, truth(network)(x.double()), 1e-5)


def test_more_outputs_than_a_tile_and_inputs_than_a_block(device: torch.device) -> None:
    network = layer(70, 70).to(device)
    x = torch.randn(2, 70, 3, 2).to(device)
    with torch.no_grad():
        assert_near(network(x), truth(network)(x.double()), 1e-5)


@pytest.mark.parametrize("rois", ["none", "whole", "pixel"])
def test_extreme_rois(rois: str, device: torch.device) -> None:
    network = layer()
    with torch.no_grad():
        network.scale.fill_({"none": -1.0, "whole": 2.0, "pixel": 0.15}[rois])
        network.loc.fill_(0.5)
    network = network.to(device)
    x = torch.randn(2, 2, 6, 5).to(device)
    if rois == "none":
        assert network(x).eq(0).all()
        assert all(grad.eq(0).all() for grad in results(network, x)[1:])
    else:
        assert_same_results(network, x, 2e-5)


# The interpreter can not multiply bfloat16.
@pytest.mark.parametrize("dtype", [torch.float16] if DEVICE.type == "cpu" else [torch.float16, torch.bfloat16])
def test_halves_and_autocast(dtype: torch.dtype, device: torch.device) -> None:
    network = layer().to(device)
    x = torch.randn(3, 2, 6, 5).to(device)
    expected = results(truth(network), x.double())
    with torch.autocast(device.type, dtype):
        found = results(network, x)
    assert found[0].dtype == dtype
    assert [grad.dtype for grad in found[1:]] == [torch.float32] * 5
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, 0.02)
    halves = network.to(dtype)
    found = results(halves, x.to(dtype))
    assert {one.dtype for one in found} == {dtype}
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, 0.02)


def test_the_same_bits_every_time(device: torch.device) -> None:
    network = layer(3, 6).to(device)
    x = torch.randn(5, 3, 6, 5).to(device)
    torch.use_deterministic_algorithms(True)
    try:
        first = results(network, x)
        for one, other in zip(first, results(network, x), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_of_gradients(device: torch.device) -> None:
    network = layer().to(device)
    x = torch.randn(2, 2, 6, 5).to(device).requires_grad_()

    def penalty(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), model.weight)[0]

    assert_near(penalty(network, x), penalty(truth(network), x.double()), 1e-4)


def test_too_little_memory_is_explained(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    network = layer().to(device)

    def full(*_args: object, **_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(stage, "pack", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"allocate 20.00 GiB. A layer's weights.*batch \(now 3\)"):
        network(torch.randn(3, 2, 6, 5).to(device))
