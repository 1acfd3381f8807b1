"""Whole networks by the engine: accelerate(model)(x) is model.eval()(x)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import assert_near, place_rois, targeted, truth
from plan_networks import COMPACT, NETWORKS, images, network, plan_of
from torch import Tensor, nn

from tkn import TargetConv2d, accelerate, build_model, load_plan
from tkn.layers import RoiLayer
from tkn.sequential import TargetSequential


class OwnSequence(TargetSequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.compact] if name in COMPACT else []) for name in NETWORKS]
)
def test_plans_equal_float64(name: str, small: bool) -> None:
    """Both layouts, for the batch that they are made for and for others."""
    model = network(name)
    plan = plan_of(model, NETWORKS[name][1], 3, small=small)
    if NETWORKS[name][2] is not None:
        assert plan.fallbacks == NETWORKS[name][2]
    reference = truth(model)
    for batch in (3, 1, 20, 3):
        x = images(name, batch)
        with torch.no_grad():
            assert_near(plan(x), reference(x.double()))


@pytest.mark.parametrize("name", NETWORKS)
def test_accelerate_chooses_a_layout_and_agrees(name: str) -> None:
    model = network(name)
    plan = accelerate(model, 2, NETWORKS[name][1])
    assert plan.batch_size == 2
    assert plan.input_size == NETWORKS[name][1]
    with torch.no_grad():
        assert_near(plan(images(name, 2)), truth(model)(images(name, 2).double()))


@pytest.mark.parametrize("batch", [1, 16, 17, 65, 128])
@pytest.mark.compact
def test_batch_sizes(batch: int) -> None:
    model = network("plain")
    plan = accelerate(model, batch, (2, 9, 9))
    for size in (batch, batch + 1, 1):
        x = images("plain", size)
        with torch.no_grad():
            assert_near(plan(x), truth(model)(x.double()))


@pytest.mark.parametrize("name", ["stn", "tstn"])
@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
def test_the_spatial_transformer(name: str, small: bool) -> None:
    torch.manual_seed(0)
    model = build_model(name, (3, 16, 16), 4)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    targeted_model = targeted(model, seed=1).eval()
    x = torch.rand(3, 3, 16, 16)
    plan = plan_of(targeted_model, (3, 16, 16), 3, small=small)
    with torch.no_grad():
        assert_near(plan(x), truth(targeted_model)(x.double()), 1e-4)  # the sampling's own rounding
    kinds = [fallback.split("(")[1] for fallback in plan.fallbacks]
    assert kinds == [
        "to)",
        "view)",
        "size)",
        "affine_grid)",
        "grid_sample)",
    ]  # the localization runs in the engine


@pytest.mark.parametrize("rois", ["pixel", "border", "full", "edge"])
@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
def test_rois_of_all_kinds(rois: str, small: bool) -> None:
    for inputs in (2, 20):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(TargetConv2d(inputs, 18, 3, padding=1), nn.BatchNorm2d(18), nn.ReLU(), nn.MaxPool2d(2)),
            *(TargetConv2d(18, 20, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(80, 3)),
        )
        targeted(model, seed=1).eval()
        place_rois(model[0], rois, (9, 9), 0)
        place_rois(model[4], rois, (4, 4), 1)
        x = torch.randn(3, inputs, 9, 9)
        with torch.no_grad():
            assert_near(plan_of(model, (inputs, 9, 9), 3, small=small)(x), truth(model)(x.double()))


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize("after", ["linear", "convolution", "nothing", "mean"])
def test_layers_of_which_nothing_is_left(after: str, small: bool) -> None:
    """All ROIs lie on the odd edge that the pooling drops."""
    for inputs in (2, 20):
        torch.manual_seed(0)
        rest = {
            "linear": [nn.Flatten(), nn.Linear(16, 3)],
            "convolution": [nn.Conv2d(4, 18, 3, padding=1)],
            "nothing": [],
            "mean": [nn.AdaptiveAvgPool2d(1)],
        }[after]
        model = nn.Sequential(TargetConv2d(inputs, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), *rest).eval()
        place_rois(model[0], "edge", (5, 5), 0)
        x = torch.randn(3, inputs, 5, 5)
        with torch.no_grad():
            assert_near(plan_of(model, (inputs, 5, 5), 3, small=small)(x), truth(model)(x.double()))


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.compact
def test_layouts_of_the_input(small: bool) -> None:
    model, x = network("plain"), images("plain", 5)
    plan = plan_of(model, (2, 9, 9), 5, small=small)
    expected = plan(x)
    for other in (
        x.to(memory_format=torch.channels_last),
        torch.cat((x, x), dim=3)[..., :9],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat((x, x), dim=0)[:5].requires_grad_(),
    ):
        assert torch.equal(plan(other), expected)
    assert torch.equal(plan(x[:1].expand(5, -1, -1, -1)), plan(x[:1].repeat(5, 1, 1, 1)))
    assert not plan(x.requires_grad_()).requires_grad
    with torch.inference_mode():
        assert torch.equal(plan(x), expected)


def test_results_are_the_callers() -> None:
    """A later call does not write into an earlier one's result."""
    plan = accelerate(network("plain"), 2, (2, 9, 9))
    first = plan(images("plain", 2))
    kept = first.clone()
    plan(images("plain", 2) + 1)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", ["plain", "unknown layers"])
def test_autocast_and_the_default_type_change_nothing(name: str) -> None:
    model, x = network(name), images(name, 3)
    plan = accelerate(model, 3, NETWORKS[name][1])
    expected = plan(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(plan(x), expected)
        assert_near(accelerate(model, 3, NETWORKS[name][1])(x), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert_near(plan(x), expected)
        assert_near(accelerate(model, 3, NETWORKS[name][1])(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("pooling", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1)], ids=str)
def test_nan_and_infinity_stay_in_their_image(pooling: nn.Module, bad: float, small: bool) -> None:
    """And come out as torch's: here every ROI is the whole map, for torch's zeros outside (NaN * 0) are NaN."""
    torch.manual_seed(0)
    for inputs in (3, 18):
        model = nn.Sequential(
            *(TargetConv2d(inputs, 20, 3, padding=1), nn.ReLU(), pooling, TargetConv2d(20, 5, 3, padding=1), nn.ReLU()),
            pooling,
        ).eval()
        plan = plan_of(model, (inputs, 13, 13), 20, small=small)
        x = torch.randn(20, inputs, 13, 13)
        clean = plan(x)
        x[3, 1, 2, 9] = bad
        y = plan(x)
        rest = [image for image in range(20) if image != 3]
        assert torch.equal(y[rest], clean[rest])
        with torch.no_grad():
            torch.testing.assert_close(
                y[3].double(), model.double()(x.double())[3], rtol=1e-5, atol=1e-5, equal_nan=True
            )
        assert bad == -torch.inf or not y[3].isfinite().all()
        x[3, 1, 2, 9] = 0  # nothing stays in the plan's memory
        assert plan(x).isfinite().all()


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
def test_nan_inside_small_rois(small: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(TargetConv2d(3, 20, 3, padding=1), nn.ReLU()).eval()
    place_rois(model[0], "random", (9, 9), 2)
    x = torch.randn(4, 3, 9, 9)
    x[1, 2, 4, 4] = torch.nan
    mask = torch.zeros(20, 9, 9, dtype=torch.bool)
    for channel, ((top, bottom), (left, right)) in enumerate(model[0].rois((9, 9)).tolist()):
        mask[channel, top:bottom, left:right] = True
    with torch.no_grad():
        expected = torch.where(mask, truth(model)(x.double()), 0.0)
    actual = plan_of(model, (3, 9, 9), 4, small=small)(x)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert actual[1].isnan().any()


def test_the_model_and_the_plan_are_independent() -> None:
    model = network("plain").train()
    x = images("plain", 4)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    plan = accelerate(model, 4, (2, 9, 9))
    expected = plan(x)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert {module.engine for module in model.modules() if isinstance(module, TargetConv2d)} == {"auto"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()
    assert torch.equal(plan(x), expected)
    model.load_state_dict(before)
    with torch.no_grad():
        assert_near(expected, truth(model).eval()(x.double()))  # evaluation mode


def test_the_plan_is_made_at_the_first_call_without_an_input_size() -> None:
    model = network("unknown layers").train()
    plan = accelerate(model, 3)
    with torch.no_grad():
        expected = truth(model).eval()(images("unknown layers", 3).double())
        for parameter in model.parameters():
            parameter.zero_()
    for early in (lambda: plan.fallbacks, lambda: plan.input_size, lambda: plan.save("nowhere")):
        with pytest.raises(ValueError, match="made at its first use"):
            early()
    with pytest.raises(ValueError, match=r"the plan takes images \[B, C, H, W\] or \[B, C, L\], not \[2\]"):
        plan(torch.zeros(2))
    with pytest.raises(ValueError, match=r"Sequential takes no images \[B, 7, 7\]: expected 4D input"):
        plan(torch.zeros(2, 7, 7))  # one image
    assert_near(plan(images("unknown layers", 3)), expected)
    assert plan.input_size == (2, 7, 7)
    assert "2 (Mish)" in plan.fallbacks
    with pytest.raises(ValueError, match=r"\[B, 2, 7, 7\], not \[3, 2, 7, 8\]"):
        plan(torch.zeros(3, 2, 7, 8))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 2, 9, 8), "the plan takes images [B, 2, 9, 9], not [2, 2, 9, 8]"),
        (torch.zeros(2, 3, 9, 9), "the plan takes images [B, 2, 9, 9], not [2, 3, 9, 9]"),
        (torch.zeros(2, 9, 9), "the plan takes images [B, 2, 9, 9], not [2, 9, 9]"),
        (torch.zeros(0, 2, 9, 9), "the plan takes images [B, 2, 9, 9], not [0, 2, 9, 9]"),
        (torch.zeros(2, 2, 9, 9, dtype=torch.float64), "float32 on the CPU, not torch.float64 on cpu"),
        (torch.zeros(2, 2, 9, 9, dtype=torch.int64), "float32 on the CPU, not torch.int64 on cpu"),
        (torch.zeros(2, 2, 9, 9, device="meta"), "float32 on the CPU, not torch.float32 on meta"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.dtype} {list(value.shape)} {value.device}",
)
def test_other_images(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        accelerate(network("plain"), 2, (2, 9, 9))(x)


class InPlace(nn.Module):
    """Adds a map to its own rectified self."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.relu(x) + x


@torch.no_grad()
def test_what_else_reads_an_operation_in_place() -> None:
    model, x = InPlace().eval(), torch.randn(3, 1, 5, 5)
    plan = accelerate(model, 3, (1, 5, 5))
    assert plan.fallbacks == ()
    assert_near(plan(x), model(x))


class Returning(nn.Module):
    def __init__(self, result: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> object:
        return self.result(x)


class Noisy(nn.Module):
    """Never gives the same result."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Conv2d(1, 1, 1), 0), "batch_size=0 must be a whole number, at least 1"),
        ((nn.Conv2d(1, 1, 1), True), "batch_size=True must be a whole number"),
        ((nn.Conv2d(1, 1, 1), 2.0), "batch_size=2.0 must be a whole number"),
        ((nn.Conv2d(1, 1, 1), 1, (1, 0, 3)), "input_size=(1, 0, 3) must be (channels, height, width)"),
        ((nn.Conv2d(1, 1, 1), 1, (1, 3.0, 3)), "input_size=(1, 3.0, 3) must be (channels, height, width)"),
        ((nn.Conv2d(1, 1, 1), 1, 28), "input_size=28 must be (channels, height, width)"),
        ((nn.Conv2d(1, 1, 1).double(), 1), "models of float32; weight is torch.float64 on cpu"),
        ((nn.Conv2d(1, 1, 1).bfloat16(), 1), "models of float32; weight is torch.bfloat16 on cpu"),
        ((nn.Conv2d(1, 1, 1, device="meta"), 1), "models of float32; weight is torch.float32 on meta"),
        ((nn.BatchNorm2d(1, affine=False).double(), 1), "running_mean is torch.float64"),
        ((Returning(lambda x: x.shape), 1, (1, 3, 3)), "networks that return tensors"),
        ((Returning(lambda _: None), 1, (1, 3, 3)), "returns none that it computes"),
        ((Noisy(), 1, (1, 5, 5)), "Noisy can't be followed: its plan would differ"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_accelerate_refuses(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        accelerate(*arguments)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"device": "gpu"}, "device='gpu' is none that torch knows"),
        ({"device": "meta"}, "device='meta' must be cpu or a CUDA GPU"),
        ({"device": "cuda:1"}, "device='cuda:1' is not there: torch sees 1 CUDA GPUs"),
        ({"device": "cuda", "dtype": torch.float64}, "on cuda must be one of float32, float16, bfloat16"),
        ({"dtype": torch.float16}, "dtype=torch.float16 on cpu must be one of float32, bfloat16"),
    ],
    ids=str,
)
def test_where_no_plan_can_be(
    place: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=re.escape(message)):
        accelerate(nn.Conv2d(1, 1, 1), 1, (1, 3, 3), **place)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_plan(tmp_path / "none.plan", **place)


def test_wrong_channels_are_the_models_error() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        accelerate(network("plain"), 2, (3, 9, 9))


def test_subclasses_keep_their_forward() -> None:
    torch.manual_seed(0)
    model = targeted(OwnSequence(TargetConv2d(1, 4, 3), nn.ReLU()), seed=0).eval()
    x = torch.rand(2, 1, 6, 6)
    plan = accelerate(model, 2, (1, 6, 6))
    assert_near(plan(x), model(x).detach())
    assert [node.kind for node in plan._graph.nodes] == ["Input", "Convolve", "relu", "Affine"]


def test_target_layers_are_leaves_of_the_trace() -> None:
    """A target layer's window and mask are numbers of the plan, not operations."""
    model = network("plain")
    assert any(isinstance(module, RoiLayer) for module in model.modules())
    assert accelerate(model, 1, (2, 9, 9)).fallbacks == ()
