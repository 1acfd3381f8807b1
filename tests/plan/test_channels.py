"""Selecting and normalising channels: shuffles, chunks and layer norms, in all arrangements, against float64."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from engine_cases import assert_near, place_rois, same_with_threads, targeted, truth
from plan_networks import agree, plan_of
from torch import Tensor, nn
from torch.nn import functional as F

from tkn import TargetConv2d
from tkn.plan.capture import build_graph, frozen
from tkn.plan.graph import ChannelNorm, Select


class Shuffle(nn.Module):
    """As torchvision spells it."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.size()
        x = x.view(batch, self.groups, channels // self.groups, height, width)
        return x.transpose(1, 2).contiguous().view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Half of the channels goes through layers, all of them change places."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            *(TargetConv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True)),
            *(TargetConv2d(half, half, 3, padding=1, groups=half), nn.BatchNorm2d(half)),
        )
        self.shuffle = Shuffle(groups) if groups % 2 == 0 else nn.ChannelShuffle(groups)

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, dim=1)
        return self.shuffle(torch.cat((one, self.branch(other)), 1))


class Selecting(nn.Module):
    """Selections that are read by a convolution, a pooling, a product, a norm, and given out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(TargetConv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24))
        self.units = nn.Sequential(ShuffleUnit(24, 2), ShuffleUnit(24, 3), ShuffleUnit(24, 4))
        self.conv, self.norm = nn.Conv2d(10, 5, 1), ChannelLast(7, 9, scaled=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.units(self.first(x))
        pooled = F.max_pool2d(F.silu(x[:, 3:15]), 2)
        mapped = self.conv(F.avg_pool2d(torch.narrow(x, 1, 2, 10), 2))
        gated = x.split([10, 14], dim=1)[0] * torch.sigmoid(x[:, ::2][:, 2:])
        return torch.cat([pooled, mapped, F.max_pool2d(gated, 2), F.avg_pool2d(self.norm(x[:, -7:]), 2)], 1)


class ChannelLast(nn.Module):
    """Norm, layers and a scale as ConvNeXt has them."""

    def __init__(self, channels: int, outputs: int, *, scaled: bool, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=affine)
        self.first, self.second = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, outputs)
        self.scale = nn.Parameter(torch.rand(outputs, 1, 1)) if scaled else None
        if affine:
            nn.init.uniform_(self.norm.weight, -1, 1.5)
            nn.init.uniform_(self.norm.bias, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.gelu(self.first(self.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return x if self.scale is None else self.scale * x


@pytest.mark.parametrize("width", [7, 20, 36])
@pytest.mark.compact
@torch.no_grad()
def test_selections(width: int) -> None:
    torch.manual_seed(0)
    agree(targeted(Selecting(), seed=1).eval(), (3, width - 1, width), (1, 3, 17))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.compact
@torch.no_grad()
def test_norms(seed: int) -> None:
    """Of any number of channels, behind normalisations, functions and concatenations, where no kernel's ROI may be."""
    chosen = Random(seed)
    torch.manual_seed(seed)
    channels, outputs, width = chosen.choice((3, 12, 17, 40)), chosen.choice((4, 18)), chosen.choice((5, 11, 21, 36))
    layers = [TargetConv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)]
    if chosen.random() < 0.5:
        layers.append(nn.Hardswish())
    layers += [
        ChannelLast(channels, outputs, scaled=chosen.random() < 0.5, affine=chosen.random() < 0.7),
        nn.Conv2d(outputs, 6, 3, padding=1, groups=chosen.choice((1, 2))),
    ]
    model = targeted(nn.Sequential(*layers), seed=seed).eval()
    if seed % 2:
        place_rois(model[0], ("pixel", "border", "edge")[seed % 3], (width, width), seed)
    agree(model, (3, width, width), (1, 1 + seed, 17), batch=1 + seed)


class Known(nn.Module):
    """Both halves are read where some channels vary and the others are known."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.one, self.other = TargetConv2d(2, 6, 3, padding=1), TargetConv2d(2, 9, 1)
        self.norm, self.large = nn.LayerNorm(15), large

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.one(x) + self.large, self.other(x) - 0.5), 1)
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("large", [0.0, 3.0])
@torch.no_grad()
def test_norms_of_known_channels(large: float) -> None:
    torch.manual_seed(0)
    model = Known(large)
    place_rois(model.one, "pixel", (9, 18), 0)
    place_rois(model.other, "border", (9, 18), 1)
    agree(model.eval(), (2, 9, 18), (1, 5))


@pytest.mark.parametrize("width", [9, 40])
@torch.no_grad()
def test_threads_change_nothing(width: int) -> None:
    torch.manual_seed(0)
    model, size = targeted(Selecting(), seed=1).eval(), (3, width, width)
    for small in (False, True):
        plan, x = plan_of(model, size, 3, small=small), torch.randn(3, *size)
        same_with_threads(lambda plan=plan, x=x: [plan(x)])  # type: ignore[misc]


class Spelled(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = TargetConv2d(3, 8, 3, padding=1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda x: torch.cat([x.chunk(3, 1)[2], x.chunk(3, 1)[0]], 1),
    "split": lambda x: x.split(3, dim=1)[1] + x.split((3, 5), 1)[0],
    "slices": lambda x: x[:, :4] * x[:, 4:].sigmoid() - x[:, ::2] + x[..., 0:4, :, :],
    "narrow": lambda x: x.narrow(1, 2, 3) / 2,
    "shuffle": lambda x: torch.channel_shuffle(x, 4),
    "unflatten": lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
    "reshape": lambda x: x.reshape(x.shape[0], 2, 4, 6, x.shape[3]).permute(0, 2, 1, 3, 4).reshape(x.shape),
    "last and back": lambda x: F.gelu(x.permute(0, 2, 3, 1)[..., 1:]).add(1).permute(0, 3, 1, 2).contiguous(),
    "moved": lambda x: x.movedim(1, -1).movedim(-1, 1)[:, 2:],
    "flat": lambda x: x.mean((2, 3))[:, 2:6] * 3,
    "layer norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), [8], eps=1e-3).permute(0, 3, 1, 2),
    "layer norm of vectors": lambda x: F.layer_norm(x.mean((2, 3)), (8,)),
    "mean of a line": lambda x: x.view(x.size(0), x.size(1), -1).mean(2) + x.flatten(2).mean(dim=-1),
    "mean of means": lambda x: x.mean(3).mean(2) + x.mean(-1).mean(-1),
    "pooling by sides": lambda x: F.avg_pool2d(x, kernel_size=x.size()[2:]).view(x.size(0), -1),
    "excitation": lambda x: x * torch.sigmoid(x.mean((2, 3))).view(x.size(0), x.size(1), 1, 1),
    "expanded": lambda x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)).expand_as(x),
    "numbers": lambda x: (1 - (-x)) * 2 + x / 3 - 0.5 * x,
    "in place": lambda x: (x + 0).mul_(2).sub_(1).div_(3),
    "one map twice": lambda x: x * x + (x + x),
    "swish": lambda x: x * x.sigmoid() + x * F.relu6(x + 3) / 6,
    "clamped": lambda x: x.clamp(0, 6) + torch.clamp(x, min=0) + F.hardtanh(x, 0.0, 6.0),
}


@pytest.mark.parametrize("how", SPELLINGS)
@torch.no_grad()
def test_spellings(how: str) -> None:
    torch.manual_seed(0)
    agree(targeted(Spelled(SPELLINGS[how]), seed=1).eval(), (3, 6, 18), (1, 4))


#: What torch must be left to: what depends on the number of images, and what is seen through other views.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "images": lambda x: x[:6].sum(0) + x,
    "images, turned": lambda x: x.transpose(0, 1)[:, :6].transpose(0, 1).sum(0) + x,
    "all of the images": lambda x: x.split(6)[0].sum(0) + x,
    "pixels": lambda x: x[:, :, 1:] * 2,
    "turned pixels": lambda x: x.transpose(2, 3) * 2,
    "channels as pixels": lambda x: x.view(x.size(0), 2, 24, 18) * 2,
    "clamped elsewhere": lambda x: x.clamp(-1, 5) + F.hardtanh(x),
    "norm of lines": lambda x: F.layer_norm(x, x.shape[-1:]),
}


@pytest.mark.parametrize("how", OTHERS)
@torch.no_grad()
def test_what_is_left_to_torch(how: str) -> None:
    torch.manual_seed(0)
    model = targeted(Spelled(OTHERS[how]), seed=1).eval()
    for small in (True, False):
        plan = plan_of(model, (3, 6, 18), 4, small=small)
        assert plan.fallbacks
        for batch in (1, 4, 9):
            x = torch.randn(batch, 3, 6, 18)
            assert_near(plan(x), truth(model)(x.double()))


def halves_written(x: Tensor) -> Tensor:
    x = x + 0
    one, _ = x.chunk(2, 1)
    one.add_(1)
    return x * 2


def written_after(x: Tensor) -> Tensor:
    x = x + 0
    one, other = x.chunk(2, 1)
    x.mul_(2)
    return one - other


def written_through_last(x: Tensor) -> Tensor:
    x = x + 0
    F.relu(x.permute(0, 2, 3, 1), inplace=True)
    return x * 2


@pytest.mark.parametrize("write", [halves_written, written_after, written_through_last])
@pytest.mark.parametrize("small", [None, False, True])
@pytest.mark.filterwarnings("ignore:torch runs the plan")  # where only torch can tell what was overwritten
@torch.no_grad()
def test_what_is_written_through_views(write: Callable[[Tensor], Tensor], small: bool | None) -> None:
    torch.manual_seed(0)
    model = targeted(Spelled(write), seed=1).eval()
    plan = plan_of(model, (3, 6, 7), 4, small=small)  # type: ignore[arg-type]
    for batch in (1, 4):
        x = torch.randn(batch, 3, 6, 7)
        assert_near(plan(x), truth(model)(x.double()))


def test_shuffles_and_norms_are_few_operations() -> None:
    graph = build_graph(frozen(targeted(Selecting(), seed=1)), (3, 8, 8))
    kinds = [type(node.operation) for node in graph.nodes]
    assert kinds.count(Select) == 3 * 2 + 5  # of what was moved several times, all at once
    assert kinds.count(ChannelNorm) == 1
    assert not any(node.by_torch for node in graph.nodes)
