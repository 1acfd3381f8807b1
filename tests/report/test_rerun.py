"""A network that goes on from a layer, held against the whole network with that layer's output changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import DenseNet, ResNet
from torchvision.models.resnet import BasicBlock

from tkn import build_model, targetize
from tkn.layers import RoiLayer, TargetConv2d, roi_layers
from tkn.report.kernels.hooks import hooked_outputs
from tkn.report.kernels.rerun import Rerun

SIZE = (3, 16, 16)


def _resnet() -> nn.Module:
    """Writes over its maps, adds its blocks' inputs, and calls one ReLU several times."""
    return targetize(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3))


def _densenet() -> nn.Module:
    return targetize(DenseNet(4, (2, 2), num_init_features=4, num_classes=3))


def _in_place() -> nn.Module:
    """All in one sequence, each ReLU over what the convolution gave."""
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Identity(), TargetConv2d(4, 5, 3), nn.ReLU(inplace=True))
    return nn.Sequential(
        *layers, TargetConv2d(5, 4, 3), nn.Dropout(), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(400, 3)
    )


class _Tangled(nn.Module):
    """Functions between modules, one of which writes over what a module gave, and modules that give views and pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.same = nn.Identity()
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.target = TargetConv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(4, 3)
        #: how often `first` was called
        self.calls = 0
        self.first.register_forward_pre_hook(self._count)

    def _count(self, _module: nn.Module, _inputs: object) -> None:
        self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        doubled = first * 2
        first.relu_()
        same = self.same(first)
        maps, _indices = self.pool(self.norm(first) + doubled)
        y = self.target(maps)
        same += 1
        maps += F.interpolate(y, scale_factor=1.0)
        return self.last((F.max_pool2d(first, 2) * y + maps).mean(dim=(2, 3)))


def _changed(model: nn.Module, layer: RoiLayer, images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    with hooked_outputs(layer, change), torch.no_grad():
        return model(images)


def _without_first(output: Tensor) -> Tensor:
    silenced = output.clone()
    silenced[:, 0] = 0
    return silenced


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


CHANGES = (_without_first, torch.neg, torch.zeros_like, _without_first)


@pytest.mark.parametrize(
    "network",
    [
        _resnet,
        _densenet,
        _in_place,
        _Tangled,
        *(lambda name=name: build_model(name, SIZE, 3) for name in ("tdn10", "tkn6", "tstn")),
    ],
)
def test_the_outputs_are_the_whole_networks(network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = network().eval()
    images = torch.randn(6, *SIZE)
    with torch.no_grad():
        model(images)  # then lazy layers are made
    layers, hooks = roi_layers(model), _hooks(model)
    for layer in layers.values():
        with torch.no_grad():
            layer.scale.fill_(0.5)
    for layer in list(layers.values())[:: max(1, len(layers) // 4)]:
        rerun = Rerun(model, layer, images)
        assert rerun.replays
        for batch in images.split(4):
            for output, change in zip(rerun(batch, CHANGES), CHANGES, strict=True):
                torch.testing.assert_close(output, _changed(model, layer, batch, change), rtol=1e-5, atol=1e-6)
        assert rerun.replays
    assert _hooks(model) == hooks
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_comes_before_runs_once_a_batch() -> None:
    torch.manual_seed(0)
    model = _Tangled().eval()
    images = torch.randn(6, *SIZE)
    rerun = Rerun(model, model.target, images)
    before = model.calls
    outputs = rerun(images, CHANGES)
    assert model.calls - before == 1 + len(CHANGES)  # hooks are called, the convolution is not
    own, convolutions = model.first._conv_forward, []

    def counted(*inputs: Tensor | None) -> Tensor:
        convolutions.append(inputs)
        return own(*inputs)

    model.first._conv_forward = counted
    assert all(map(torch.equal, rerun(images, CHANGES), outputs))
    assert len(convolutions) == 1


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = TargetConv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)).mean(dim=(2, 3))


class _Remembering(nn.Module):
    """Writes, after the layer, to what an earlier module keeps for itself: that cannot be repeated."""

    class Keeping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = x * 2
            return self.kept

    def __init__(self) -> None:
        super().__init__()
        self.keeping, self.layer = self.Keeping(), TargetConv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.keeping(x))
        self.keeping.kept += y
        return self.keeping.kept.mean(dim=(2, 3))


@pytest.mark.parametrize("network", [_Twice, _Remembering])
def test_where_it_cannot_be_sure_the_whole_network_runs(network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = network().eval()
    images = torch.randn(6, *SIZE)
    rerun = Rerun(model, model.layer, images)
    assert not rerun.replays
    for output, change in zip(rerun(images, CHANGES), CHANGES, strict=True):
        assert torch.equal(output, _changed(model, model.layer, images, change))


def test_a_network_that_takes_another_way_runs_whole() -> None:
    """By a batch's own numbers, differently from the images that were tried."""

    class Choosing(_Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.mean() > 1 else self.layer(x).mean(dim=(2, 3))

    torch.manual_seed(0)
    model = Choosing().eval()
    images = torch.randn(6, *SIZE)
    rerun = Rerun(model, model.layer, images)
    assert rerun.replays
    for output, change in zip(rerun(images + 2, CHANGES), CHANGES, strict=True):
        assert torch.equal(output, _changed(model, model.layer, images + 2, change))
    assert not rerun.replays
