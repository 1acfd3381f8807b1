"""Target layers inside their ROIs under autocast: factors rounded to bfloat16, sums in float32, maps in bfloat16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_cases import assert_near, difference, engine_of, results, targeted, truth, with_engine
from torch import Tensor, nn

from tkn import TargetConv2d
from tkn.backends.cpu.backend import chain
from tkn.backends.cpu.build import kernels
from tkn.ops.eager import _InRois
from tkn.sequential import TargetSequential
from tkn.spec import encode


def rounded(x: Tensor) -> Tensor:
    return x.detach().bfloat16().to(x.dtype)


def layer(inputs: int, outputs: int, **options: object) -> TargetConv2d:
    torch.manual_seed(0)
    made = TargetConv2d(inputs, outputs, 3, engine="roi", **{"padding": 1, **options})
    targeted(made, seed=1)
    with torch.no_grad():
        made.weight.copy_(rounded(made.weight))
    return made


def images(batch: int, channels: int, size: int = 9) -> Tensor:
    return rounded(torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0)))


class UnderAutocast(nn.Module):
    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.model(x)


class Unrounded(UnderAutocast):
    """A layer's sums under autocast, before they become a map of its type."""

    def forward(self, x: Tensor) -> Tensor:
        target = self.model.target()
        halves = chain(tuple(x.shape), x.dtype, (target,), self.dtype)
        return _InRois.apply(x, replace(halves, dtype=torch.float32), encode((target,)), *target.tensors)


LAYERS = {
    "odd channels": layer(17, 20),
    "two words of channels": layer(41, 37),
    "chunks of channels": layer(300, 24),
    "groups": layer(40, 36, groups=2),
    "stride, dilation, no bias": layer(32, 16, stride=2, dilation=2, bias=False),
    "unpadded": layer(16, 16, padding=0),
    "soft": layer(16, 20, clip=False),
}


@pytest.mark.parametrize("batch", [1, 5, pytest.param(20, marks=pytest.mark.compact), 37, 70])
@pytest.mark.parametrize("name", LAYERS)
def test_rounded_factors(name: str, batch: int) -> None:
    """Factors that are rounded already give float32's sums; the output and its gradient are rounded."""
    network, x = LAYERS[name], images(batch, LAYERS[name].in_channels)
    output = UnderAutocast(network)(x)
    assert engine_of(output) == "roi"
    ours, theirs = results(Unrounded(network), x), results(truth(network), x.double())
    assert_near(ours[0], theirs[0])
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, ours[0].bfloat16())
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one, other, 0.005)
    for one, other in zip(results(UnderAutocast(network), x), theirs, strict=True):
        assert_near(one, other, 0.01)


def rounds() -> bool:
    """Whether this machine has the products."""
    return bool(kernels(torch.float32).tkn_bfloat16())


@pytest.mark.compact
def test_factors_are_rounded_once() -> None:
    """Any numbers: as if rounded by hand, where the machine has the products; else as they are."""
    network, x = layer(24, 20), torch.randn(37, 24, 9, 9)
    with torch.no_grad():
        network.weight.copy_(torch.randn_like(network.weight))
    by_hand, by_hand_x = with_engine(network, "roi"), rounded(x) if rounds() else x
    if rounds():
        with torch.no_grad():
            by_hand.weight.copy_(rounded(network.weight))
    assert_near(Unrounded(network)(x), by_hand(by_hand_x), 1e-6)


def sequence() -> TargetSequential:
    return TargetSequential(layer(3, 18), nn.ReLU(), nn.MaxPool2d(2), layer(18, 33), nn.ReLU(), layer(33, 5))


def test_a_chain_is_as_near_as_by_torch() -> None:
    network, x = sequence(), images(37, 3, 12)
    ours = results(UnderAutocast(network), x)
    theirs = results(UnderAutocast(with_engine(network, "dense")), x)
    expected = results(truth(network), x.double())
    assert difference(ours[0], expected[0]) <= difference(theirs[0], expected[0])
    assert (difference(ours[0], expected[0]) > 1e-5) == rounds()
    # Either may take a number near zero for another sign, and a ReLU with it.
    for one, other, gradient in zip(ours[1:], theirs[1:], expected[1:], strict=True):
        assert difference(one, gradient) <= 2 * difference(other, gradient)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_where_it_belongs(bad: float) -> None:
    network, x = layer(17, 20), images(20, 17)
    x[3, 5, 4, 4] = x[7, 16, 0, 8] = bad
    with torch.no_grad():
        ours, theirs = UnderAutocast(network)(x), network(x)
    assert not theirs.isfinite().all()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(theirs))


def test_few_channels_stay_in_float32() -> None:
    network, x = layer(3, 40), torch.randn(20, 3, 9, 9)
    assert_near(Unrounded(network)(x), truth(network)(x.double()), 1e-6)


def test_the_other_half_is_computed_in_float32() -> None:
    network, x = layer(24, 20), torch.randn(20, 24, 9, 9).half()
    output, sums = UnderAutocast(network, torch.float16)(x), Unrounded(network, torch.float16)(x)
    assert_near(sums, truth(network)(x.double()), 1e-6)
    assert output.dtype == torch.float16
    assert torch.equal(output, sums.half())


def test_autocast_ends_where_it_ends() -> None:
    """The lists of both ways are kept side by side."""
    network, x = layer(24, 20), torch.randn(20, 24, 9, 9)
    expected = network(x)
    UnderAutocast(network)(x)
    assert torch.equal(network(x), expected)
