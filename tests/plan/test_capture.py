"""What a plan takes for an activation, and what it does where its parts' inputs are not of the batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_cases import assert_near, targeted, truth
from plan_networks import NETWORKS, Residual, network, plan_of
from torch import Tensor, nn
from torch.nn import functional as F

from tkn import TargetConv2d, accelerate, load_plan
from tkn.plan import plan as plan_module
from tkn.plan.capture import build_graph, frozen
from tkn.plan.compare import difference, tells
from tkn.plan.graph import Call, Convolve
from tkn.plan.parts import KernelPart, Part, Program, Values

BATCHES = (1, 2, 5, 7, 8, 20)


class Prototypes(nn.Module):
    """A buffer of two maps goes through the convolution that the images go through."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = TargetConv2d(3, 8, 3, padding=1)
        self.register_buffer("proto", torch.rand(2, 3, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.conv(x)), torch.relu(self.conv(self.proto))
        return a.mean((2, 3)) @ b.mean((2, 3)).T


class FirstImages(nn.Module):
    """Adds what the first images of a batch give: as many as there are, at most `count`."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.first = TargetConv2d(3, 8, 3, padding=1)
        self.second, self.third = TargetConv2d(8, 8, 3, padding=1), TargetConv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        r = h[: self.count]
        a, b = self.second(h), self.third(r)
        return a.mean((0, 2, 3)) + b.mean((0, 2, 3))


class AddsOfFirst(nn.Module):
    """A sum in which one image may meet a batch."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.conv, self.last = TargetConv2d(3, 8, 3, padding=1), TargetConv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        r = F.gelu(h[: self.count])[:1]
        return self.last(torch.relu(h) + r)


class GrowingMap(nn.Module):
    """Its padding depends on the number of images, from ten on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = TargetConv2d(3, 8, 3, padding=1), TargetConv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.pad(self.conv(x), (0, x.shape[0] // 10)))


@pytest.mark.parametrize(
    "make",
    [Prototypes, lambda: FirstImages(2), lambda: FirstImages(6), lambda: AddsOfFirst(6)],
    ids=["prototypes", "first two", "first six", "one and a batch"],
)
@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.compact
def test_values_that_are_not_of_the_batch(make: Callable[[], nn.Module], small: bool) -> None:
    torch.manual_seed(0)
    model = targeted(make(), seed=1).eval()
    size = (3, 16, 16)
    plan = plan_of(model, size, 2, small=small)
    for batch in BATCHES:
        x = torch.rand(batch, *size)
        with torch.no_grad():
            assert_near(plan(x), truth(model)(x.double()))
            assert_near(accelerate(model, 2, size)(x), truth(model)(x.double()))


def counted(part: Part, calls: list[Part], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note a part's calls."""
    run = part.run

    def noted(values: Values) -> None:
        calls.append(part)
        run(values)

    monkeypatch.setattr(part, "run", noted)


def test_parts_whose_inputs_disagree_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only these: with few enough images the kernels compute."""
    torch.manual_seed(0)
    plan = plan_of(targeted(FirstImages(6), seed=1).eval(), (3, 16, 16), 2, small=False)
    by_torch: list[Part] = []
    for part in plan._program.parts:
        if isinstance(part, KernelPart):
            counted(part.by_torch, by_torch, monkeypatch)
    for batch, expected in ((5, 0), (6, 0), (7, 1), (20, 1)):
        by_torch.clear()
        plan(torch.rand(batch, 3, 16, 16))
        assert len(by_torch) == expected


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
def test_inputs_that_are_not_what_a_part_was_made_for(small: bool) -> None:
    """Of another shape, type, device or number: none is read by the kernels."""
    model = targeted(Residual(), seed=1).eval()
    plan = plan_of(model, (2, 7, 8), 3, small=small)
    part = next(part for part in plan._program.parts if isinstance(part, KernelPart))
    good = torch.rand(3, 2, 7, 8)
    assert part._readable([good]) is not None
    for bad in (
        *(good[:, :1], good[:, :, :6], good[0], good[:0], good.double(), good.to("meta"), good.to_sparse()),
        *([good], None, good.numpy(), good.flatten(1)),
    ):
        assert part._readable([bad]) is None
    for odd in (
        torch.complex(0 * good, good).conj().imag,
        good.to(memory_format=torch.channels_last),
        good[:1].expand(3, -1, -1, -1),
    ):
        (readable,) = part._readable([odd])
        assert torch.equal(readable, odd)
        assert readable.is_contiguous()
        assert not readable.is_neg()


def test_sizes_that_depend_on_the_number_of_images_are_refused() -> None:
    torch.manual_seed(0)
    model = targeted(GrowingMap(), seed=1).eval()
    plan = accelerate(model, 2, (3, 16, 16))
    x = torch.rand(9, 3, 16, 16)
    with torch.no_grad():
        assert_near(plan(x), truth(model)(x.double()))
    with pytest.raises(ValueError, match=r"pad gives \[10, 8, 16, 17\], not \[B, 8, 16, 16\]"):
        plan(torch.rand(10, 3, 16, 16))


def test_what_is_an_activation() -> None:
    graph = build_graph(frozen(targeted(Prototypes(), seed=1)), (3, 16, 16))
    by_name = {node.name: node for node in graph.nodes}
    assert by_name["model_proto"].size is None
    assert [type(node.operation) for node in graph.nodes if node.name.startswith("conv")] == [Convolve, Call]


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = TargetConv2d(2, 4, 3)
        self.conv.register_forward_hook(lambda _, __, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


class OtherWindow(TargetConv2d):
    def window(self, size: tuple[int, ...]) -> Tensor:
        return super().window(size) * 3


@pytest.mark.parametrize("make", [Hooked, lambda: nn.Sequential(OtherWindow(2, 4, 3))], ids=["hook", "window"])
def test_layers_that_users_have_changed_are_torchs(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = targeted(make(), seed=1).eval()
    plan = accelerate(model, 2, (2, 7, 7))
    x = torch.rand(2, 2, 7, 7)
    with torch.no_grad():
        assert_near(plan(x), model(x))
    assert len(plan.fallbacks) == 1


class ByShape(nn.Module):
    """Asks for what is known of images before they are there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = TargetConv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.ndim != 4 or x.dtype != torch.float32:
            raise ValueError("no images")
        with torch.autocast(x.device.type, enabled=False):
            sizes = list(x.shape)
            x = F.interpolate(self.conv(x), size=[*x.shape[2:]]) * sizes[0] / x.size(0)
            return F.interpolate(x, size=[x.size(2) + x.shape[3] // 2, sizes[3]])


def test_what_is_known_of_images_is_known_to_the_trace() -> None:
    torch.manual_seed(0)
    model = targeted(ByShape(), seed=1).eval()
    plan = accelerate(model, 2, (2, 7, 6))
    assert plan.fallbacks == ("size (size)", "mul (mul)", "size_8 (size)", "truediv (truediv)")
    for batch in (1, 4):
        x = torch.rand(batch, 2, 7, 6)
        with torch.no_grad():
            assert_near(plan(x), model(x))


def dead(model: nn.Module) -> nn.Module:
    """With a last layer of zeros."""
    with torch.no_grad():
        list(model.modules())[-1].weight.zero_()
        list(model.modules())[-1].bias.zero_()
    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_networks_that_give_no_finite_number_are_compared_all_the_same(value: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 20, 3), nn.ReLU(), nn.Conv2d(20, 4, 1)).eval()
    with torch.no_grad():
        model[2].bias[1] = value
    with pytest.warns(UserWarning, match="could not be compared"):
        plan = accelerate(model, 2, (2, 7, 7))
    x = torch.rand(2, 2, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(plan(x), model(x), equal_nan=True)


def test_a_comparison_that_says_nothing_is_said_to() -> None:
    """All outputs zero: any two networks agree."""
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="the plan of Sequential could not be compared with it"):
        accelerate(dead(nn.Sequential(nn.Conv2d(2, 20, 3), nn.ReLU(), nn.Conv2d(20, 4, 1))), 2, (2, 7, 7))


def test_other_images_are_tried_where_the_first_say_nothing() -> None:
    """Zero on all images of positive numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(-model[0].weight.abs())
        model[0].bias.fill_(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model.eval(), 2, (1, 5, 5))


class DeadButWrong(nn.Module):
    """An operation in place that a plan can't follow, behind which all is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.relu(-1e3 - (self.relu(x) + x))


def test_a_wrong_plan_does_not_hide_behind_zeros() -> None:
    with pytest.warns(UserWarning, match="could not be compared"):
        accelerate(DeadButWrong(), 1, (1, 5, 5))


@pytest.mark.parametrize("kind", ["dead", "overflowing"])
def test_wrong_kernels_do_not_hide_behind_zeros(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is held against torch on inputs of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 20, 3), nn.Mish(), nn.Conv2d(20, 4, 1))
    with torch.no_grad():
        model[0].weight.mul_(0 if kind == "dead" else 1e38)
        model[0].bias.fill_(-100.0 if kind == "dead" else 1e38)
    run = KernelPart.run

    def wrong(self: KernelPart, values: dict[int, object]) -> None:
        run(self, values)
        if self.nodes[0] > 2:  # the last layer
            for position in self.outputs:
                values[position] = values[position] * 1.1

    monkeypatch.setattr(KernelPart, "run", wrong)
    graph = build_graph(frozen(model.eval()), (2, 7, 7))
    with pytest.warns(UserWarning, match="torch runs the plan: the engine's result differs by"):
        plan = plan_module.Plan(graph, 2)
    assert not any(isinstance(part, KernelPart) for part in plan._program.parts)


def test_differences() -> None:
    nan, inf = torch.nan, torch.inf
    same = torch.tensor([1.0, nan, inf, -inf, -2.0])
    assert difference(same, same.clone()) == 0
    assert difference(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0])) == pytest.approx(0.1)
    for other in ([1.0, 0.0, inf, -inf, -2.0], [1.0, nan, -inf, -inf, -2.0], [1.0, nan, nan, -inf, -2.0], [nan] * 5):
        assert difference(torch.tensor(other), same) == inf
    assert difference(torch.tensor([1.0, nan, inf, -inf, -1.0]), same) == pytest.approx(0.5)
    assert difference(torch.tensor([1e-30]), torch.zeros(1)) == inf
    assert difference(torch.zeros(2), torch.zeros(2)) == 0
    assert difference(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
    assert difference(torch.zeros(2), torch.zeros(3)) == inf
    assert difference(torch.zeros(2), torch.zeros(2).double()) == inf
    assert difference(torch.full((2,), nan), torch.full((2,), nan)) == 0


def test_what_tells() -> None:
    changing = torch.tensor([[1.0, 2.0], [1.0, 3.0]])
    assert tells([changing])
    assert tells([torch.ones(2), changing, torch.tensor(1.0)])
    assert not tells([changing, torch.full((2,), torch.nan)])
    for nothing in ([[0.0, 0.0]] * 2, [[1.0, 2.0]] * 3, [[1.0, torch.nan], [1.0, 2.0]], [[1.0, 2.0]]):
        assert not tells([torch.tensor(nothing)])


def test_values_are_given_up_when_no_part_reads_them_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = build_graph(frozen(network("tdn10")), NETWORKS["tdn10"][1])
    program = Program.by_torch(graph)
    alive: list[int] = []
    for part in program.parts:
        run = part.run

        def counting(values: Values, run: Callable[[Values], None] = run) -> None:
            run(values)
            alive.append(len(values))

        monkeypatch.setattr(part, "run", counting)
    program(torch.rand(2, *NETWORKS["tdn10"][1]))
    assert max(alive) <= 4 < len(graph.nodes)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.filterwarnings("ignore:the plan of")  # which says that NaN is no finite number
def test_windows_that_are_no_numbers(clip: bool) -> None:
    """Empty ROIs where they clip; else the kernel gives no numbers, here as there."""
    torch.manual_seed(0)
    first = TargetConv2d(2, 20, 3, padding=1, clip=clip)
    model = targeted(nn.Sequential(first, nn.ReLU(), nn.Conv2d(20, 4, 1)), seed=1)
    with torch.no_grad():
        first.loc[0, 3], first.scale[1, 5] = torch.nan, torch.nan
    x = torch.rand(3, 2, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(accelerate(model, 3, (2, 7, 7))(x), model.eval()(x), equal_nan=True)


class Written(nn.Module):
    """`write` makes z of what a convolution gives, which is read again afterwards."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.write = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 1), write

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.write(y)
        return (self.second(y).flatten(1) + z.flatten(1)) * 2


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": torch.relu_,
    "inplace": lambda y: F.relu(y, inplace=True),
    "method": lambda y: y.sigmoid_(),
    "of a dropped out": lambda y: F.relu(F.dropout(y, training=False), inplace=True),
    "of a flat one": lambda y: y.flatten(1).relu_(),
    "after another name": lambda y: (y.flatten(1), F.silu(y, inplace=True))[0],
    "of a sum": lambda y: F.relu(y + y, inplace=True),
    "of a mean": lambda y: F.relu(y.mean((2, 3)), inplace=True).repeat(1, 64)[:, :192],
}


@pytest.mark.parametrize("small", [None, False, True])
@pytest.mark.parametrize("how", WRITES)
@pytest.mark.filterwarnings("ignore:torch runs the plan")  # where only torch can tell what was overwritten
@torch.no_grad()
def test_what_is_written_over_and_read_again(how: str, small: bool | None) -> None:
    torch.manual_seed(0)
    model = Written(WRITES[how]).eval()
    plan = plan_module.Plan(build_graph(frozen(model), (2, 8, 8)), 4, small=small)
    for batch in (1, 4, 17):
        x = torch.randn(batch, 2, 8, 8)
        assert_near(plan(x), model(x))


class Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 64, 3, padding=1), nn.Linear(4096, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        return self.linear(y.view(y.size(0), -1))


@torch.no_grad()
def test_a_view_of_what_a_convolution_gives() -> None:
    """No way in which its strides would not do is taken."""
    torch.manual_seed(0)
    model, x = Viewed().eval(), torch.randn(4, 3, 8, 8)
    assert_near(accelerate(model, 4, (3, 8, 8))(x), model(x))
    maps = accelerate(nn.Sequential(model.conv, nn.ReLU()), 4, (3, 8, 8))(x)
    assert maps.is_contiguous()


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pool2d(x, (2,)),
        lambda x: F.avg_pool2d(x, 2, []),
        lambda x: torch.max_pool2d(x, 3, 2, 1, 1, True),
        lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
        lambda x: F.max_pool2d(x, [3, 2], padding=(1, 0), dilation=2),
        lambda x: F.max_pool2d(x, 2, 2, 1, 2, ceil_mode=True),
    ],
)
@pytest.mark.filterwarnings("ignore:the plan of Pooled could not be compared")  # windows of nothing but padding
@torch.no_grad()
def test_poolings_as_torch_takes_them(pool: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return pool(self.conv(x))

    torch.manual_seed(0)
    for side in (3, 4, 9):  # of the first, windows reach beyond the map
        model, x = Pooled().eval(), torch.randn(2, 1, side, side)
        try:
            expected = model(x)
        except RuntimeError:  # too small for torch
            continue
        plan = accelerate(model, 2, (1, side, side))
        plan.save(tmp_path / "net.plan")
        for one in (plan, load_plan(tmp_path / "net.plan")):
            torch.testing.assert_close(one(x), expected, rtol=1e-5, atol=1e-5)


def test_sizes_that_depend_on_the_number_of_images_are_refused_by_torch_too() -> None:
    class Turning(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(2, 3).contiguous() if len(x) > 8 else x

    model = nn.Sequential(nn.Conv2d(2, 3, 3), Turning(), nn.Conv2d(3, 4, 3)).eval()
    plan = accelerate(model, 2, (2, 6, 12))
    with pytest.raises(ValueError, match="can't follow sizes that depend on the number of images"):
        plan(torch.zeros(17, 2, 6, 12))
