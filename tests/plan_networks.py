"""Networks of which tests make plans, with what torch runs of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from engine_cases import assert_near, targeted, truth
from torch import Tensor, nn
from torch.nn import functional as F

from tkn import AttentiveRegularization2d, TargetConv1d, TargetConv2d, build_model, targetize
from tkn.plan.capture import build_graph, frozen
from tkn.plan.parts import Program
from tkn.plan.plan import Plan
from tkn.sequential import TargetSequential


class Residual(nn.Module):
    """Sums of maps, in a row and across layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = TargetConv2d(2, 20, 3, padding=1)
        self.second = TargetConv2d(20, 20, 3, padding=1)
        self.norm = nn.BatchNorm2d(20)
        self.third = nn.Conv2d(20, 20, 1)
        self.fc = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.first(x))
        b = F.relu(self.norm(self.second(a)) + a)
        b += self.third(b)
        c = torch.add(b, a)
        return self.fc(F.adaptive_avg_pool2d(c, 1).flatten(1))


class Concatenating(nn.Module):
    """What is used twice, pending normalisations, and both poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.first = TargetConv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.second = TargetConv2d(13, 9, 3, padding=1, bias=False)
        self.mean, self.maximum = nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm(self.first(x))
        b = torch.cat([x, a.relu()], dim=1)
        c = self.second(b)
        return torch.cat((self.mean(b), self.maximum(c), self.maximum(a), self.mean(c)), 1)


class Untraceable(nn.Module):
    """A module whose path depends on its values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x * 2


class WithUntraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = TargetConv2d(2, 6, 3, padding=1)
        self.own = Untraceable()
        self.last = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.own(self.conv(x)))


class Flattened(nn.Module):
    """Vectors that are sums or concatenations of flattened maps."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = TargetConv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm1d(7)
        self.fc = nn.Linear({"add": 256, "cat": 512, "scales": 320, "cat linear": 263, "add linear": 7}[how], 7)
        self.other = nn.Linear(256, 7)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x).flatten(1)
        if self.how == "add":
            return self.norm(self.fc(a + torch.relu(a)))
        if self.how == "cat":
            return self.norm(self.fc(torch.cat((a, torch.relu(a)), 1)))
        if self.how == "scales":
            return self.norm(self.fc(torch.cat((a, self.second(x).flatten(1)), 1)))
        b = self.other(a)
        return self.norm(self.fc(torch.cat((a, b), 1) if self.how == "cat linear" else b + self.norm(b)))


class Broadcast(nn.Module):
    """Sums of maps of different sizes."""

    def __init__(self, outputs: int, pooled: bool) -> None:
        super().__init__()
        self.first, self.second = TargetConv2d(2, 8, 3, padding=1), nn.Conv2d(8, outputs, 1)
        self.pool = nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(self.pool(x)) + x


class OtherTypes(nn.Module):
    """Computes in float64 between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = TargetConv2d(2, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x).double()).to(x.dtype))


class Twice(nn.Module):
    """One layer in two places, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = TargetConv2d(3, 3, 3, padding=1)
        self.weight = nn.Parameter(torch.rand(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.conv(x)) * self.weight) + self.weight


class Functions(nn.Module):
    """Every function that the engine knows: after a convolution, pooled, of a sum, after one another."""

    def __init__(self) -> None:
        super().__init__()
        modules = (
            nn.ReLU6(),
            nn.SiLU(True),
            nn.Hardswish(),
            nn.Hardsigmoid(),
            nn.GELU(),
            nn.ELU(0.7),
            nn.LeakyReLU(0.2),
        )
        self.functions = nn.ModuleList((*modules, nn.PReLU(), nn.Sigmoid(), nn.Tanh(), nn.GELU("tanh")))
        self.first = TargetConv2d(2, 22, 3, padding=1)
        self.norm = nn.BatchNorm2d(22)
        self.convs = nn.ModuleList(TargetConv2d(22, 9, 3, padding=1) for _ in self.functions)
        self.pool, self.last = nn.MaxPool2d(2), nn.Conv2d(9, 20, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.first(x)))
        maps = [function(conv(x)) for function, conv in zip(self.functions, self.convs, strict=True)]
        a = self.pool(F.hardswish(self.convs[0](x))) + F.leaky_relu(self.pool(maps[1]), negative_slope=0.3)
        b = torch.tanh(F.gelu(maps[2] + maps[3], approximate="tanh"))
        pooled = [self.pool(one) for one in (*maps, b)] + [a, F.elu(a, 0.5).sigmoid()]
        return torch.cat([F.relu6(self.last(one)) for one in pooled], 1)


class Pooled(nn.Module):
    """Poolings as functions and methods, over all of a map, and windows that leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = TargetConv2d(2, 9, 3, padding=1), TargetConv2d(9, 5, 3, padding=1)
        self.last, self.ceil = nn.Linear(5, 3), nn.MaxPool2d(3, 2, 1, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.max_pool2d(x, 2, ceil_mode=True) + F.max_pool2d(
            F.avg_pool2d(x, 2, 1, 1), 3, 2, dilation=1, ceil_mode=True
        )
        x = self.ceil(self.second(F.relu(x)))
        means = (
            F.adaptive_avg_pool2d(x, 1).flatten(1) + x.mean([-1, 2]) + torch.mean(x, (2, 3), keepdim=True).flatten(1)
        )
        return self.last(means)


class Spoken(nn.Module):
    """A network of one dimension: blocks with sums, several poolings as modules, functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.first = TargetConv1d(3, 20, 5, 2, 2)
        self.second, self.third = TargetConv1d(20, 20, 9, padding=4), TargetConv1d(20, 18, 3, padding="same")
        self.norm, self.other = nn.BatchNorm1d(20), nn.BatchNorm1d(38)
        self.short = nn.Conv1d(20, 20, 1, bias=False)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Conv1d(38, 38, 1), nn.Sigmoid())
        self.last, self.drop = TargetConv1d(38, 6, 3, groups=2), nn.Dropout1d(0.2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.first(x))
        b = F.max_pool1d(F.relu(self.norm(self.second(a)) + self.short(a)), 2)
        c = torch.cat([b, F.silu(self.third(b))], 1)
        c = self.drop(self.other(c)) * self.gate(c)
        d = F.avg_pool1d(self.last(c), 3, 1, 1)
        means = d.mean(2) + torch.mean(d, -1) + F.adaptive_avg_pool1d(d, 1).squeeze(-1)
        return self.fc(means + d.mean(dim=-1, keepdim=True).flatten(1))


class Spectral(nn.Module):
    """Maps in a network of lines: these become maps of one channel, and at last vectors again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = TargetConv1d(4, 8, 3, padding=1), TargetConv2d(1, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.first(x)).unsqueeze(1)
        return self.fc(F.relu(self.second(maps)).mean((2, 3)))


def plain() -> nn.Module:
    """A common CNN, targeted: normalisation before and after activations, a fully connected head with BatchNorm1d."""
    return targetize(
        nn.Sequential(
            *(nn.Conv2d(2, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(20, 33, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(33), nn.Dropout2d(0.3), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(132, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 5)),
        )
    )


def head(channels: int) -> list[nn.Module]:
    return [nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(channels, 5)]


#: name: (model, input size, what torch runs)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...] | None]] = {
    "tkn6": (lambda: build_model("tkn6", (1, 9, 8), 4), (1, 9, 8), ()),
    "cnn6": (lambda: build_model("cnn6", (1, 8, 8), 4), (1, 8, 8), ()),
    "dn10": (lambda: build_model("dn10", (1, 13, 12), 4), (1, 13, 12), ()),
    "tdn10": (lambda: build_model("tdn10", (3, 13, 12), 4), (3, 13, 12), ()),
    "tdn10 gaussian": (lambda: build_model("tdn10", (1, 9, 8), 4, attention="gaussian"), (1, 9, 8), ()),
    "tdn10 flat": (lambda: build_model("tdn10", (1, 9, 8), 4, attention="flat"), (1, 9, 8), ()),
    "tdn10 soft": (lambda: build_model("tdn10", (1, 9, 8), 4, clip=False), (1, 9, 8), ()),
    "tdn40": (lambda: build_model("tdn40", (3, 8, 8), 1), (3, 8, 8), ()),
    "plain": (plain, (2, 9, 9), ()),
    "functions": (Functions, (2, 8, 7), ()),
    "residual": (Residual, (2, 7, 8), ()),
    "concatenating": (Concatenating, (3, 9, 8), ()),
    "untraceable": (WithUntraceable, (2, 7, 7), ("own (Untraceable)",)),
    "twice": (Twice, (3, 7, 7), ()),
    "poolings": (
        lambda: nn.Sequential(
            TargetConv2d(2, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.AvgPool2d(3, 2, 1),
            nn.MaxPool2d(2, 1, 1),
            TargetConv2d(12, 9, 3, padding=1),
            nn.MaxPool2d(3, 1, 1, dilation=2),
            nn.BatchNorm2d(9),
            nn.AvgPool2d((1, 2), (2, 1), (0, 1)),
        ),
        (2, 11, 10),
        (),
    ),
    "poolings as functions": (Pooled, (2, 9, 10), ()),
    "uneven means": (
        lambda: nn.Sequential(
            TargetConv2d(2, 6, 3, padding=1),
            nn.AvgPool2d(2, ceil_mode=True),
            nn.AvgPool2d(3, 1, 1, count_include_pad=False),
            nn.AvgPool2d(2, 1, divisor_override=3),
            nn.AdaptiveAvgPool2d(3),
            nn.Conv2d(6, 3, 1),
        ),
        (2, 9, 9),
        (),
    ),
    "means of windows": (
        lambda: nn.Sequential(
            TargetConv2d(2, 6, 3, padding=1),
            nn.AdaptiveAvgPool2d((3, 4)),
            nn.Conv2d(6, 3, 1),
            nn.AdaptiveAvgPool2d((3, 4)),
        ),
        (2, 9, 8),
        (),
    ),
    "odd edges": (
        lambda: nn.Sequential(
            TargetConv2d(1, 18, 3, padding=1), nn.MaxPool2d((3, 2)), nn.ReLU(), nn.Conv2d(18, 3, 2), nn.AvgPool2d(2)
        ),
        (1, 11, 9),
        (),
    ),
    "groups": (
        lambda: nn.Sequential(
            TargetConv2d(4, 24, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(24, 48, 3, groups=24), *head(48)
        ),
        (4, 8, 8),
        (),
    ),
    "strides and dilations": (
        lambda: nn.Sequential(
            TargetConv2d(9, 20, (3, 5), (2, 1), (1, 2)),
            nn.ReLU(),
            TargetConv2d(20, 9, 3, padding="same", dilation=(1, 2)),
            nn.ReLU(),
            nn.Conv2d(9, 4, (2, 1), padding=(2, 0), stride=3),
        ),
        (9, 9, 10),
        (),
    ),
    "one by one, then a mean": (
        lambda: nn.Sequential(
            TargetConv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 7, 1), nn.AvgPool2d(2)
        ),
        (3, 9, 9),
        (),
    ),
    "wide": (
        lambda: TargetSequential(
            TargetConv2d(3, 150, 3, padding=1), nn.ReLU(), TargetConv2d(150, 70, 3, padding=1), *head(70)
        ),
        (3, 6, 6),
        (),
    ),
    "unknown layers": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            AttentiveRegularization2d(8),
            nn.Mish(),
            TargetConv2d(8, 6, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(6, track_running_stats=False),
            nn.Conv2d(6, 5, 3),
            nn.GroupNorm(1, 5),
            nn.Flatten(2),
            nn.Flatten(),
            nn.Linear(125, 3),
            nn.LogSoftmax(dim=1),
        ),
        (2, 7, 7),
        (
            "1 (AttentiveRegularization2d)",
            "2 (Mish)",
            "3.pad (pad)",
            "4 (BatchNorm2d)",
            "6 (GroupNorm)",
            "10 (LogSoftmax)",
        ),
    ),
    "vectors": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 40), nn.ReLU(), nn.Linear(40, 3)), (2, 3, 3), ()),
    "nothing": (lambda: nn.Sequential(nn.Identity(), nn.Dropout()), (2, 3, 3), ()),
    "only torch": (lambda: nn.Sequential(nn.Mish(), nn.Softplus()), (2, 3, 3), ("0 (Mish)", "1 (Softplus)")),
    "a map that is a vector": (lambda: nn.Sequential(TargetConv2d(2, 5, 1), nn.ReLU()), (2, 1, 1), ()),
    **{
        f"flattened: {how}": (lambda how=how: Flattened(how), (2, 8, 8), None)
        for how in ("add", "cat", "scales", "cat linear", "add linear")
    },
    "broadcast over pixels": (lambda: Broadcast(8, True), (2, 7, 7), None),
    "broadcast over channels": (lambda: Broadcast(1, False), (2, 7, 7), None),
    "other types": (OtherTypes, (2, 7, 7), None),
    "one dimension": (Spoken, (3, 41), ()),
    "lines and maps": (Spectral, (4, 11), ("unsqueeze (unsqueeze)",)),
    "pools of lines, and a layer that torch runs": (
        lambda: nn.Sequential(
            TargetConv1d(2, 6, 3, padding=1),
            nn.ReflectionPad1d(1),
            nn.AvgPool1d(2, ceil_mode=True),
            nn.AdaptiveAvgPool1d(5),
            nn.AdaptiveMaxPool1d(4),
            nn.Conv1d(6, 3, 1),
        ),
        (2, 13),
        ("1 (ReflectionPad1d)",),
    ),
    "a line that torch pads": (
        lambda: TargetSequential(
            TargetConv1d(3, 20, 4, padding=2, padding_mode="circular"),
            nn.ReLU(),
            nn.MaxPool1d(3, 2, 1, ceil_mode=True),
            nn.Mish(),
            TargetConv1d(20, 4, 3, dilation=2, attention="gaussian"),
            nn.Flatten(),
            nn.Linear(32, 3),
        ),
        (3, 22),
        ("0.pad (pad)", "3 (Mish)"),
    ),
}
COMPACT = ("tdn10", "plain", "functions", "concatenating", "strides and dilations", "groups", "poolings", "wide")


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return targeted(NETWORKS[name][0](), seed=1).eval()


def images(name: str, batch: int) -> Tensor:
    return torch.randn(batch, *NETWORKS[name][1], generator=torch.Generator().manual_seed(batch))


def plan_of(model: nn.Module, size: tuple[int, ...], batch: int, *, small: bool) -> Plan:
    return Plan(build_graph(frozen(model), size), batch, small=small)


def agree(model: nn.Module, size: tuple[int, int, int], batches: tuple[int, ...], batch: int = 3) -> None:
    """Both arrangements and torch, one operation after the other, are right; the engine knows all of the network."""
    graph = build_graph(frozen(model), size)
    by_torch = Program.by_torch(graph)
    for small in (True, False):
        plan = plan_of(model, size, batch, small=small)
        assert plan.fallbacks == ()
        assert plan._program is not None
        assert plan._program.way.startswith("vectors")
        for images in batches:
            x = torch.randn(images, *size, generator=torch.Generator().manual_seed(images))
            expected = truth(model)(x.double())
            assert_near(plan(x), expected)
            assert_near(by_torch(x), expected)
