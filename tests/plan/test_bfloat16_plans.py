"""Plans that multiply pairs of bfloat16: near torch's sums of numbers that are rounded alike, and near the network."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_cases import assert_near, difference, same_with_threads, targeted, truth
from plan_networks import NETWORKS, images, network, plan_of
from torch import Tensor, nn

from tkn import TargetConv2d, accelerate, build_model, load_plan
from tkn.backends.cpu import build
from tkn.geometry import Geometry
from tkn.plan import arrange
from tkn.plan.capture import build_graph, frozen
from tkn.plan.graph import Convolve
from tkn.plan.pairing import Pairing, pairing_of
from tkn.plan.place import Place
from tkn.plan.plan import Plan

BFLOAT16 = torch.bfloat16


@pytest.fixture
def products() -> None:
    """Only on machines that have them; elsewhere `test_machines_without_the_products` is what there is to test."""
    if (lacking := build.without_bfloat16()) is not None:
        pytest.skip(f"needs {lacking}")


@pytest.fixture
def pairs_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways that multiply pairs are taken, whatever the machine does meanwhile."""

    def seconds(run: Callable[[], object], best: float) -> float:
        del best
        run()
        return 1.0 if "bfloat16" in getattr(run.func, "way", "a part") else 2.0  # type: ignore[attr-defined]

    monkeypatch.setattr(arrange, "_seconds", seconds)


computes = pytest.mark.usefixtures("products", "pairs_win")


def plan_in_pairs(model: nn.Module, size: tuple[int, ...], batch: int, *, small: bool) -> Plan:
    return Plan(build_graph(frozen(model), size), batch, Place.of("cpu", BFLOAT16), small=small)


def paired(plan: Plan) -> bool:
    assert plan._program is not None
    return any(part.paired for part in plan._program.parts)


def rounded(x: Tensor) -> Tensor:
    return x.detach().bfloat16().to(x.dtype)


def one_by(function: nn.Module, pool: nn.Module | None = None, **options: object) -> nn.Sequential:
    layer = TargetConv2d(20, 24, 3, **{"padding": 1, **options})
    return nn.Sequential(layer, nn.BatchNorm2d(24), function, *([] if pool is None else [pool]))


#: A convolution and what it does as it writes; (C, H, W) of its images.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "channels": (lambda: one_by(nn.Identity()), (20, 9, 8)),
    "odd channels": (lambda: nn.Sequential(TargetConv2d(19, 17, 3, padding=1)), (19, 8, 9)),
    "many channels": (lambda: nn.Sequential(TargetConv2d(130, 40, 3, padding=1)), (130, 5, 5)),
    "one by one": (lambda: nn.Sequential(TargetConv2d(33, 24, 1)), (33, 6, 5)),
    "groups": (lambda: nn.Sequential(TargetConv2d(38, 36, 3, padding=1, groups=2)), (38, 7, 7)),
    "stride": (lambda: one_by(nn.ReLU(), stride=2), (20, 9, 8)),
    "dilation": (lambda: one_by(nn.ReLU(), dilation=2, padding=2, stride=(1, 2)), (20, 9, 8)),
    "unpadded": (lambda: one_by(nn.ReLU(), padding=0, bias=False), (20, 9, 8)),
    "maximum": (lambda: one_by(nn.ReLU(), nn.MaxPool2d(2)), (20, 9, 8)),
    "mean": (lambda: one_by(nn.SiLU(), nn.AvgPool2d(3)), (20, 9, 9)),
    "overlapping": (lambda: one_by(nn.ReLU(), nn.MaxPool2d(3, 2, 1)), (20, 9, 8)),
    "one image channel": (lambda: nn.Sequential(TargetConv2d(1, 20, 5, padding=2), nn.MaxPool2d(2)), (1, 12, 11)),
    "even kernel": (lambda: nn.Sequential(TargetConv2d(1, 20, 4)), (1, 11, 12)),
    "three image channels": (lambda: nn.Sequential(TargetConv2d(3, 20, 7, stride=2, padding=3)), (3, 13, 12)),
    "no columns before": (lambda: nn.Sequential(TargetConv2d(3, 9, (1, 4), padding=(0, 0), stride=3)), (3, 4, 14)),
    "fully connected": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(75, 40), nn.ReLU()), (3, 5, 5)),
    **{
        function.__class__.__name__: (lambda function=function: one_by(function), (20, 7, 6))
        for function in (
            *(nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.GELU(), nn.ELU(0.7), nn.LeakyReLU(0.2)),
            *(nn.Sigmoid(), nn.Tanh(), nn.PReLU()),
        )
    },
}
#: Kinds whose pixels are all that is paired: vectors over one image stay in float32.
ONLY_ROWS = ("groups", "one image channel", "even kernel", "three image channels", "no columns before")


def layer(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    make, size = LAYERS[name]
    torch.manual_seed(0)
    model = targeted(make(), seed=1).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.copy_(rounded(module.weight))
    return model, size


def rounded_images(size: tuple[int, ...], batch: int) -> Tensor:
    return rounded(torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch)))


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.compact) for name in LAYERS])
@computes
@torch.no_grad()
def test_factors_that_are_rounded_give_the_sums_of_float32(name: str, small: bool) -> None:
    model, size = layer(name)
    exact = truth(model)
    plan = plan_in_pairs(model, size, 16 if small else 17, small=small)
    assert paired(plan) == (not small or name not in ONLY_ROWS)
    for batch in (1, 2, 5, 8, 16, 17):
        x = rounded_images(size, batch)
        result = plan(x)
        assert result.dtype == torch.float32
        assert_near(result, exact(x.double()))
        assert torch.equal(plan(x.bfloat16()), result)
    same_with_threads(lambda: [plan(rounded_images(size, batch)) for batch in (1, 3, 17)])


@pytest.mark.parametrize("batch", range(1, 18))
@computes
@torch.no_grad()
def test_all_batches_for_which_plans_are_made(batch: int) -> None:
    model, size = layer("maximum")
    plan = accelerate(model, batch, size, dtype=BFLOAT16)
    for images_ in (batch, batch + 1):
        x = rounded_images(size, images_)
        assert_near(plan(x), truth(model)(x.double()))


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize("name", NETWORKS)
@computes
@torch.no_grad()
def test_networks_are_as_near_as_bfloat16_is(name: str, small: bool) -> None:
    """Numbers as they come, through all of a network."""
    model = network(name)
    plan = plan_in_pairs(model, NETWORKS[name][1], 4, small=small)
    for batch in (1, 4, 17):
        x = images(name, batch)
        assert difference(plan(x), model(x)) < 0.02


@computes
@torch.no_grad()
def test_sums_are_of_rounded_numbers_through_a_chain() -> None:
    """What a convolution writes is rounded once, as the next one reads it."""
    torch.manual_seed(0)
    layers = (TargetConv2d(20, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), TargetConv2d(24, 20, 3, padding=1))
    model = targeted(nn.Sequential(*layers), seed=1).eval()
    x = rounded_images((20, 8, 8), 17)
    expected = x.double()
    for module in truth(model):
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(rounded(module.weight))
            expected = rounded(expected.float()).double()
        expected = module(expected)
    # A sum that lies between two numbers of bfloat16 may become the other one.
    for small in (False, True):
        assert_near(plan_in_pairs(model, (20, 8, 8), 16, small=small)(x), expected, 1e-3)
        assert difference(plan_in_pairs(model, (20, 8, 8), 16, small=small)(x), model(x)) > 1e-3


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@computes
@torch.no_grad()
def test_what_is_not_finite_stays_where_it_belongs(bad: float, small: bool) -> None:
    model, size = layer("odd channels")
    x = rounded_images(size, 17)
    x[3, 5, 4, 4] = x[7, 18, 0, 8] = bad
    ours, theirs = plan_in_pairs(model, size, 16, small=small)(x), plan_of(model, size, 16, small=small)(x)
    assert not theirs.isfinite().all()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(theirs))


@computes
@torch.no_grad()
def test_the_error_is_said() -> None:
    model, size = build_model("tkn6", (1, 12, 12), 4).eval(), (1, 12, 12)
    targeted(model, seed=1)
    plan, exact = (accelerate(model, 4, size, dtype=dtype) for dtype in (BFLOAT16, torch.float32))
    assert plan.error is not None
    assert exact.error is not None
    assert 1e-4 < plan.error.mean < plan.error.largest < 0.05
    assert exact.error.largest < 1e-5
    assert repr(plan).endswith(f"bfloat16 on the CPU, error {plan.error})")
    assert "error" not in repr(exact)
    assert plan.dtype == BFLOAT16
    one, eight = "vectors over one image", "vectors over 8 images"
    assert {f"{one}, bfloat16", one} < set(plan.timings)
    assert eight not in plan.timings
    assert accelerate(model, 4, dtype=BFLOAT16).error is None  # not made yet
    with pytest.raises(ValueError, match=r"bfloat16 on the CPU, not torch.float16 on cpu"):
        plan(torch.zeros(1, *size, dtype=torch.float16))


@computes
@torch.no_grad()
def test_files_hold_float32(tmp_path: Path) -> None:
    model, size = network("plain"), NETWORKS["plain"][1]
    x, y = images("plain", 4), model(images("plain", 4))
    in_pairs = accelerate(model, 4, size, dtype=BFLOAT16)
    in_pairs.save(tmp_path / "pairs.plan")
    accelerate(model, 4, size).save(tmp_path / "exact.plan")
    assert (tmp_path / "pairs.plan").read_bytes() == (tmp_path / "exact.plan").read_bytes()
    assert_near(load_plan(tmp_path / "pairs.plan")(x), y)
    loaded = load_plan(tmp_path / "exact.plan", dtype=BFLOAT16)
    for plan in (loaded, copy.deepcopy(in_pairs), pickle.loads(pickle.dumps(loaded))):
        assert plan.dtype == BFLOAT16
        assert 1e-5 < difference(plan(x), y) < 0.02
        assert plan.error is not None


@computes
@torch.no_grad()
def test_what_differs_too_much_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(arrange.TOLERANCES, BFLOAT16, 1e-6)
    model, size = layer("channels")
    model[0].weight.mul_(1.001)
    with pytest.warns(UserWarning, match=r"torch runs the plan: the engine's result differs by"):
        plan = accelerate(model, 40, size, dtype=BFLOAT16)
    assert all("torch" in way for way in plan.timings)


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ("flags : avx512f avx512bw avx512vl", r"this one lacks avx512_bf16, avx512_vbmi2"),
        ("flags : avx512bw avx512vl avx512_bf16 avx512_vbmi2", "those here were compiled without"),
    ],
)
def test_machines_without_the_products(
    flags: str, missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, size = network("plain"), NETWORKS["plain"][1]
    plan = accelerate(model, 2, size)
    plan.save(tmp_path / "net.plan")
    monkeypatch.setattr(build, "_cpu", lambda: flags)
    monkeypatch.setattr(build, "kernels", lambda _: SimpleNamespace(tkn_bfloat16=lambda: 0))
    for make in (lambda: accelerate(model, 2, size, dtype=BFLOAT16), lambda: load_plan("net.plan", dtype=BFLOAT16)):
        with pytest.raises(ValueError, match=rf"dtype=torch.bfloat16 on cpu needs .*{missing}"):
            make()
    monkeypatch.setattr(build, "available", lambda _: False)
    with pytest.raises(ValueError, match="needs the engine's kernels, which are not available on this machine"):
        accelerate(model, 2, size, dtype=BFLOAT16)


def pairing(conv: nn.Conv2d, size: tuple[int, int], mask: Tensor | None = None) -> Pairing | None:
    convolve = Convolve(conv.weight.detach(), None, Geometry.of_conv(conv, size), conv.groups)
    live = torch.ones(conv.in_channels, *size, dtype=torch.bool) if mask is None else mask
    return pairing_of(convolve, live.numpy())


def test_channels_of_the_same_rois_are_pairs() -> None:
    mask = torch.zeros(5, 1, 6, dtype=torch.bool)
    for channel, columns in enumerate((range(3), range(3, 6), range(6), range(3), range(3, 6))):
        mask[channel, 0, list(columns)] = True
    made = pairing(nn.Conv2d(5, 8, 1), (1, 6), mask)
    assert made is not None
    assert made.members.tolist() == [[0, 3], [1, 4], [2, -1]]
    assert made.of(mask.numpy(), False).any(axis=3).sum() == 12


def test_only_what_is_faster_is_paired() -> None:
    assert pairing(nn.Conv2d(1, 8, 1), (4, 4)) is None
    assert pairing(nn.Conv2d(16, 4, 3), (4, 4)) is None  # few outputs
    assert pairing(nn.Conv2d(8, 8, 3, groups=8), (4, 4)) is None
    beside = pairing(nn.Conv2d(1, 8, 5, padding=2), (6, 7))
    assert beside is not None
    assert beside.beside
    assert (beside.geometry.kernel, beside.geometry.input_size) == ((5, 3), (6, 8))
    assert beside.geometry.output_size == (6, 7)
