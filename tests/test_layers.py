"""Target layers and attentive regularization against the slow reference, forward and gradients."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import product
from random import Random
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tkn import (
    AttentiveRegularization1d,
    AttentiveRegularization2d,
    AttentiveRegularization3d,
    TargetConv1d,
    TargetConv2d,
    TargetConv3d,
)
from tkn.attention import attention_function
from tkn.layers import RoiLayer, clipped, roi_layers
from tkn.roi import roi_mask

TARGETS = {1: TargetConv1d, 2: TargetConv2d, 3: TargetConv3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
REGULARIZATIONS = {1: AttentiveRegularization1d, 2: AttentiveRegularization2d, 3: AttentiveRegularization3d}
ROIS = ("random", "pixel", "border", "full")


@dataclass(frozen=True)
class Case:
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    bias: bool
    rois: str
    attention: str
    scale_unit: float
    clip: bool

    def __str__(self) -> str:
        def text(value: object) -> str:
            return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

        return "-".join(f"{field.name[:3]}{text(getattr(self, field.name))}" for field in fields(self))


def cases(dims: int, count: int) -> list[Case]:
    """`count` combinations in which every value of every option comes equally often, in a fixed random order."""
    random = Random(dims)
    options: dict[str, list[Any]] = {
        "size": {1: [(9,), (10,)], 2: [(9, 9), (8, 8), (7, 10), (10, 6)], 3: [(5, 5, 6), (5, 6, 5)]}[dims],
        "kernel": [(k,) * dims for k in (1, 2, 3, 4, 5)] + [(3, 5, 2)[:dims], (1, 3, 3)[:dims]],
        "stride": [(1,) * dims, (2,) * dims, (2, 1, 3)[:dims]],
        "padding": ["same", "valid", (0,) * dims, (1,) * dims, (2,) * dims, (1, 2, 0)[:dims]],
        "dilation": [(1,) * dims, (2,) * dims, (1, 2, 1)[:dims]],
        "groups": [1, 2, 4],
        "bias": [True, False],
        "rois": list(ROIS),
        "attention": ["cauchy", "gaussian", "flat"],
        "scale_unit": [0.5, 1.0],
        "clip": [True, True, False],
    }
    columns = {name: random.sample((values * count)[:count], count) for name, values in options.items()}
    chosen = []
    for values in zip(*columns.values(), strict=True):
        case = dict(zip(columns, values, strict=True))
        if case["padding"] == "same":  # torch's own restriction
            case["stride"] = (1,) * dims
        reach = [d * (k - 1) + 1 for k, d in zip(case["kernel"], case["dilation"], strict=True)]
        if any(r > n for r, n in zip(reach, case["size"], strict=True)):  # keeps every output non-empty
            case["dilation"] = (1,) * dims
        chosen.append(Case(**case))
    return chosen


def randomise(layer: RoiLayer, rois: str, size: tuple[int, ...], generator: torch.Generator) -> None:
    """Set loc and scale: anywhere, around one pixel, across the map's borders, or the whole map."""
    shape, length = layer.loc.shape, torch.tensor(size, dtype=torch.float64)[:, None]
    loc = torch.rand(shape, generator=generator, dtype=torch.float64)
    scale = 0.2 + torch.rand(shape, generator=generator, dtype=torch.float64)
    if rois == "pixel":
        loc, scale = ((loc * length).floor() + 0.5) / length, 0.3 * math.sqrt(2) / length.expand(shape)
    elif rois == "border":
        loc, scale = loc.round(), scale / 2
    elif rois == "full":
        loc, scale = torch.full_like(loc, 0.5), torch.ones_like(scale)
    with torch.no_grad():
        layer.loc.copy_(loc)
        layer.scale.copy_(scale)


def convolved(case: Case, x: Tensor, layer: RoiLayer) -> Tensor:
    zeros: tuple[tuple[int, int], ...]
    if case.padding == "same":
        zeros = reference.same_padding(case.kernel, case.dilation)
    else:
        padding = (0,) * len(case.size) if case.padding == "valid" else case.padding
        zeros = tuple((int(p), int(p)) for p in padding)
    return reference.convolution(x, layer.weight, layer.bias, case.stride, zeros, case.dilation, case.groups)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("case", cases(1, 24) + cases(2, 48) + cases(3, 18), ids=str)
def test_target_layer_equals_the_reference(case: Case) -> None:
    """Forward, and the gradients of input, weight, bias, loc and scale."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = TARGETS[len(case.size)](
        4,
        8,
        case.kernel,
        case.stride,
        case.padding,
        case.dilation,
        case.groups,
        case.bias,
        attention=case.attention,
        scale_unit=case.scale_unit,
        clip=case.clip,
        dtype=torch.float64,
    )
    x = torch.randn(2, 4, *case.size, generator=generator, dtype=torch.float64, requires_grad=True)
    activation = convolved(case, x, layer)
    size = tuple(activation.shape[2:])
    randomise(layer, case.rois, size, generator)
    expected = activation * reference.window(size, layer.loc, layer.scale, case.attention, case.scale_unit)
    if case.clip:
        mask = reference.roi_mask(size, layer.loc, layer.scale)
        assert case.rois != "pixel" or mask.flatten(1).sum(dim=1).eq(1).all()
        assert case.rois != "full" or mask.all()
        expected = expected * mask

    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    downstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    gradients = torch.autograd.grad(output, inputs, downstream)
    for gradient, right in zip(gradients, torch.autograd.grad(expected, inputs, downstream), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("attention", ["gaussian", "cauchy", "flat"])
@pytest.mark.parametrize("size", [(7,), (5, 6), (3, 4, 3)], ids=str)
def test_regularization_equals_the_reference(size: tuple[int, ...], attention: str, clip: bool) -> None:
    layer = REGULARIZATIONS[len(size)](3, attention=attention, clip=clip).double()
    generator = torch.Generator().manual_seed(1)
    randomise(layer, "random", size, generator)
    x = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = x * reference.window(size, layer.loc, layer.scale, attention, 0.5)
    if clip:
        expected = expected * reference.roi_mask(size, layer.loc, layer.scale)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-12, atol=0)
    inputs = [x, layer.loc, layer.scale]
    gradients = torch.autograd.grad(layer(x).square().sum(), inputs)
    for gradient, right in zip(gradients, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-12)


def differentiable(layer: nn.Module, x: Tensor, *names: str) -> Callable[..., Tensor]:
    """The layer's output on x as a function of the named parameters."""
    return lambda *values: functional_call(layer, dict(zip(names, values, strict=True)), x)


@pytest.mark.parametrize("attention", ["gaussian", "cauchy", "flat"])
@pytest.mark.parametrize("size", [(6,), (4, 5), (3, 2, 3)], ids=str)
def test_gradcheck_of_loc_and_scale(size: tuple[int, ...], attention: str) -> None:
    torch.manual_seed(0)
    layer = TARGETS[len(size)](1, 2, 3, padding=1, attention=attention, dtype=torch.float64)
    randomise(layer, "random", size, torch.Generator().manual_seed(2))
    x = torch.randn(1, 1, *size, dtype=torch.float64)
    assert torch.autograd.gradcheck(differentiable(layer, x, "loc", "scale"), (layer.loc, layer.scale))


def test_gradcheck_of_rho() -> None:
    torch.manual_seed(0)
    layer = AttentiveRegularization2d(3, attention="gaussian", rho=0.4, learn_rho=True).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    function = differentiable(layer, x, "loc", "scale", "rho")
    assert torch.autograd.gradcheck(function, (layer.loc, layer.scale, layer.rho))


@pytest.mark.parametrize("attention", ["gaussian", "cauchy", "flat"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_infinite_scale_is_exactly_the_convolution(dims: int, attention: str) -> None:
    torch.manual_seed(dims)
    layer = TARGETS[dims](3, 6, 3, 2, 1, 1, 3, attention=attention)
    conv = CONVOLUTIONS[dims](3, 6, 3, 2, 1, 1, 3)
    conv.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    nn.init.constant_(layer.scale, torch.inf)
    x = torch.randn(2, 3, *(7, 8, 9)[:dims])
    assert torch.equal(layer(x), conv(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_attention_starts_at_the_whole_map(dims: int) -> None:
    layer = TARGETS[dims](3, 5, 3)
    assert layer.loc.tolist() == [[0.5] * 5] * dims
    assert layer.scale.tolist() == [[1.0] * 5] * dims
    size = (4, 5, 6)[:dims]
    assert layer.rois(size).tolist() == [[[0, n] for n in size]] * 5
    nn.init.zeros_(layer.loc)
    nn.init.zeros_(layer.scale)
    layer.reset_attention()
    assert layer.rois(size).tolist() == [[[0, n] for n in size]] * 5


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_defaults_are_those_of_torch(dims: int) -> None:
    """The same arguments in the same order, the same parameters and, with the same seed, the same weights."""
    torch.manual_seed(0)
    conv = CONVOLUTIONS[dims](2, 4, 3)
    torch.manual_seed(0)
    layer = TARGETS[dims](2, 4, 3)
    assert isinstance(layer, CONVOLUTIONS[dims])
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "loc", "scale"]
    assert torch.equal(layer.weight, conv.weight)
    assert torch.equal(layer.bias, conv.bias)
    torch.manual_seed(0)
    conv = CONVOLUTIONS[dims](2, 4, 3, dtype=torch.float64)
    torch.manual_seed(0)
    assert torch.equal(TARGETS[dims](2, 4, 3, dtype=torch.float64).weight, conv.weight)
    assert (layer.stride, layer.padding, layer.dilation) == (conv.stride, conv.padding, conv.dilation)
    assert (layer.attention, layer.scale_unit, layer.clip, layer.block) == ("cauchy", 0.5, True, 0)
    assert layer.min_size == (3,) * dims


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    torch.manual_seed(0)
    layer = TargetConv2d(2, 3, 3, padding=1, padding_mode=mode)
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
    conv.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(2, 2, 5, 6)
    torch.testing.assert_close(layer(x), conv(x) * layer.window((5, 6)))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unbatched_input(dims: int) -> None:
    torch.manual_seed(0)
    layer = TARGETS[dims](3, 4, 3, padding=1)
    randomise(layer, "random", (5, 6, 4)[:dims], torch.Generator().manual_seed(0))
    x = torch.randn(3, *(5, 6, 4)[:dims])
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_zero_outside_the_roi_with_bias_and_nothing_flows_back() -> None:
    torch.manual_seed(0)
    layer = TargetConv2d(2, 3, 3, padding=1)
    randomise(layer, "random", (8, 9), torch.Generator().manual_seed(3))
    outside = ~roi_mask((8, 9), layer.rois((8, 9)))
    assert 0 < outside.sum() < outside.numel()
    activation = nn.functional.conv2d(torch.randn(2, 2, 8, 9), layer.weight, layer.bias, padding=1)
    regularization = AttentiveRegularization2d(3, clip=True)
    regularization.load_state_dict({"loc": layer.loc, "scale": layer.scale})
    leaf = activation.detach().requires_grad_()
    output = regularization(leaf)
    assert output[:, outside].eq(0).all()
    assert output[:, ~outside].ne(0).all()
    output.sum().backward()
    assert leaf.grad[:, outside].eq(0).all()


def test_convolution_sees_the_real_neighbours_across_the_border_of_the_roi() -> None:
    layer = TargetConv1d(1, 1, 3, padding=1, bias=False, min_size=1)
    nn.init.ones_(layer.weight)
    nn.init.constant_(layer.scale, 0.3 * math.sqrt(2) / 5)
    assert layer.rois((5,)).tolist() == [[[2, 3]]]
    assert layer(torch.tensor([[[1.0, 2, 4, 8, 16]]])).tolist() == [[[0, 0, 14, 0, 0]]]


def test_clip_multiplies_by_a_masked_window() -> None:
    """Outside the ROI finite values become zero; a NaN or an infinity times zero stays visible as NaN."""
    layer = AttentiveRegularization1d(1, clip=True)
    nn.init.constant_(layer.scale, 0.2)
    output = layer(torch.tensor([[1e30, torch.inf, 1.0, torch.nan, -1e30]]))
    assert layer.rois((5,)).tolist() == [[[2, 3]]]
    assert output.isnan().tolist() == [[False, True, False, True, False]]
    assert output[0, [0, 2, 4]].tolist() == [0, 1, 0]


def test_autocast_to_bfloat16() -> None:
    torch.manual_seed(0)
    layer = TargetConv2d(4, 8, 3, padding=1)
    randomise(layer, "random", (8, 8), torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0.02, atol=0.02)
    output.float().sum().backward()
    assert layer.loc.grad.dtype == torch.float32
    assert layer.loc.grad.isfinite().all()


def test_bfloat16_layer() -> None:
    torch.manual_seed(0)
    layer = TargetConv2d(4, 8, 3, padding=1, dtype=torch.bfloat16)
    randomise(layer, "random", (8, 8), torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    expected = copy.deepcopy(layer).float()(x.float())
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_windows_of_large_maps(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = AttentiveRegularization2d(8, clip=True)
    with torch.no_grad():
        layer.loc.uniform_()
        layer.scale.fill_(0.05)
    layer.to(dtype)
    expected = copy.deepcopy(layer).double()(torch.ones(1, 8, 224, 224, dtype=torch.float64))
    assert layer.window((224, 224)).dtype == torch.float32
    output = layer(torch.ones(1, 8, 224, 224, dtype=dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projection_holds_a_layer_of_half_precision_during_training(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = AttentiveRegularization2d(64, clip=True, dtype=dtype)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(5):
        optimiser.zero_grad()
        (layer(torch.ones(1, 64, 30, 300, dtype=dtype)).float() * torch.randn(64, 30, 300)).sum().backward()
        optimiser.step()
        layer.project_((30, 300))
        assert layer.rois((30, 300)).diff(dim=-1).min() >= 3
    assert layer.rois((30, 300)).diff(dim=-1).min() < 6


@pytest.mark.parametrize(
    "make",
    [
        lambda **where: TargetConv2d(2, 3, 3, **where),
        lambda **where: AttentiveRegularization1d(3, **where),
        lambda **where: AttentiveRegularization2d(3, attention="gaussian", learn_rho=True, **where),
    ],
    ids=["target", "1d", "rho"],
)
def test_dtype_and_device_of_all_parameters(make: Callable[..., RoiLayer]) -> None:
    layer = make(dtype=torch.float64, device="meta")
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.float64, "meta")}


def same_state(layer: nn.Module, other: nn.Module) -> bool:
    here, there = layer.state_dict(), other.state_dict()
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


STARTED = {
    **{f"target{dims}d": lambda kind=kind: kind(2, 4, 3, groups=2) for dims, kind in TARGETS.items()},
    **{f"regularization{dims}d": lambda kind=kind: kind(4) for dims, kind in REGULARIZATIONS.items()},
    "rho": lambda: AttentiveRegularization2d(4, attention="gaussian", rho=0.3),
    "learned_rho": lambda: AttentiveRegularization2d(4, attention="gaussian", rho=-0.2, learn_rho=True),
}


@pytest.mark.parametrize("kind", STARTED)
def test_reset_parameters_starts_the_layer_again(kind: str) -> None:
    torch.manual_seed(0)
    fresh, layer = STARTED[kind](), STARTED[kind]()
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(0.1)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert same_state(layer, fresh)


@pytest.mark.parametrize("kind", STARTED)
def test_a_layer_made_on_the_meta_device_starts_as_any_other(kind: str) -> None:
    torch.manual_seed(0)
    fresh = STARTED[kind]()
    with torch.device("meta"):
        layer = STARTED[kind]()
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(torch.nan)  # whatever was in the memory
    torch.manual_seed(0)
    layer.reset_parameters()
    assert same_state(layer, fresh)


def test_skipped_initialisation() -> None:
    layer = nn.utils.skip_init(TargetConv1d, 2, 3, 3, padding=1)
    assert {p.device.type for p in layer.parameters()} == {"cpu"}
    layer.reset_parameters()
    assert layer.rois((4,)).tolist() == [[[0, 4]]] * 3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = TargetConv2d(2, 3, 3, attention="gaussian", min_size=2, clip=False, block=1)
    copied = duplicate(layer)
    x = torch.randn(1, 2, 6, 6)
    assert torch.equal(copied(x), layer(x))
    assert repr(copied) == repr(layer)
    nn.init.constant_(copied.scale, 0.3)
    assert layer.scale.eq(1).all()


@pytest.mark.parametrize(
    "layer",
    [
        TargetConv2d(2, 3, 3),
        AttentiveRegularization3d(3),
        AttentiveRegularization2d(3, attention="gaussian", rho=0.3),
        AttentiveRegularization2d(3, attention="gaussian", rho=0.3, learn_rho=True),
    ],
    ids=["target", "3d", "rho", "learned-rho"],
)
def test_state_dict_round_trip(layer: RoiLayer) -> None:
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.uniform_(0.1, 0.9)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.state_dict().keys() == layer.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), layer.state_dict().values(), strict=True))
    assert torch.equal(fresh.window((4, 5, 6)[: layer.num_dims]), layer.window((4, 5, 6)[: layer.num_dims]))


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def without_metadata_of_ours(state: Any) -> Any:
    """A state dict as it was before the attention function's name travelled with it."""
    for entry in state._metadata.values():
        entry.pop("attention", None)
        entry.pop("scale_unit", None)
    return state


@pytest.mark.parametrize(
    ("made", "loading", "message"),
    [
        ({"attention": "gaussian"}, {}, r"attention=gaussian, scale_unit=0\.5, not attention=cauchy, scale_unit=0\.5"),
        ({"scale_unit": 1.0}, {}, r"attention=cauchy, scale_unit=1\.0, not attention=cauchy, scale_unit=0\.5"),
    ],
)
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_weights_learned_with_another_window_are_refused(
    made: dict[str, Any], loading: dict[str, Any], message: str, saved: bool, strict: bool
) -> None:
    model = nn.Sequential(nn.Sequential(TargetConv2d(1, 2, 3, **made)), AttentiveRegularization2d(2, **made))
    other = nn.Sequential(nn.Sequential(TargetConv2d(1, 2, 3, **loading)), AttentiveRegularization2d(2, **loading))
    nn.init.constant_(model[0][0].scale, 0.3)
    state = model.state_dict()
    assert state.keys() == {"0.0.weight", "0.0.bias", "0.0.loc", "0.0.scale", "1.loc", "1.scale"}
    if saved:
        state = saved_and_loaded(state)
    for layer in ("0.0", "1"):
        with pytest.raises(RuntimeError, match=rf"\b{layer}\.loc and scale were learned with {message}"):
            other.load_state_dict(state, strict=strict)
    assert other[0][0].scale.eq(1).all()
    with pytest.raises(RuntimeError, match=r"\tloc and scale were learned with"):
        other[1].load_state_dict(model[1].state_dict())


@pytest.mark.parametrize("keep", [saved_and_loaded, dict, without_metadata_of_ours, copy.deepcopy])
def test_weights_learned_with_the_same_window_or_an_unknown_one_are_loaded(keep: Callable[[Any], Any]) -> None:
    options = {"attention": "gaussian", "scale_unit": 1.0}
    layer, other = TargetConv2d(1, 2, 3, **options), TargetConv2d(1, 2, 3, **options)
    nn.init.constant_(layer.scale, 0.3)
    other.load_state_dict(keep(layer.state_dict()))
    assert same_state(other, layer)


def test_the_attention_functions_name_travels_with_a_users_own_destination() -> None:
    destination: dict[str, Any] = {}
    layer = TargetConv2d(1, 2, 3)
    layer.state_dict(destination=destination, prefix="layer.")
    assert destination.keys() == {f"layer.{name}" for name in ("weight", "bias", "loc", "scale")}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_weights_of_a_dense_convolution_mean_the_whole_map(dims: int) -> None:
    torch.manual_seed(0)
    conv, layer = CONVOLUTIONS[dims](1, 2, 3), TARGETS[dims](1, 2, 3)
    nn.init.constant_(layer.loc, 0.1)
    nn.init.constant_(layer.scale, 0.3)
    state = conv.state_dict()
    assert layer.load_state_dict(state, strict=True) == ([], [])
    assert state.keys() == {"weight", "bias"}
    assert torch.equal(layer.weight, conv.weight)
    assert layer.loc.eq(0.5).all()
    assert layer.scale.eq(1).all()


def test_weights_of_a_dense_convolution_take_the_place_of_a_layers_on_the_meta_device() -> None:
    conv = nn.Conv2d(1, 2, 3, dtype=torch.float64)
    layer = TargetConv2d(1, 2, 3, device="meta")
    layer.load_state_dict(conv.state_dict(), assign=True)
    assert {(p.dtype, p.device.type, p.requires_grad) for p in layer.parameters()} == {(torch.float64, "cpu", True)}
    assert layer.rois((4, 4)).tolist() == [[[0, 4], [0, 4]]] * 2


def test_only_a_state_dict_with_the_layers_weight_resets_its_attention() -> None:
    model = nn.Sequential(TargetConv2d(1, 2, 3), nn.Linear(2, 2), AttentiveRegularization2d(2))
    nn.init.constant_(model[0].scale, 0.3)
    head = {f"1.{name}": tensor for name, tensor in nn.Linear(2, 2).state_dict().items()}
    missing, _ = model.load_state_dict(head, strict=False)
    assert missing == ["0.weight", "0.bias", "0.loc", "0.scale", "2.loc", "2.scale"]
    assert model[0].scale.eq(torch.tensor(0.3)).all()
    damaged = model.state_dict()
    del damaged["0.loc"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.loc"'):
        model.load_state_dict(damaged)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_batch_normalisation_is_not_fused_into_a_target_layer(dims: int, bias: bool) -> None:
    layer = TARGETS[dims](2, 3, 3, bias=bias).eval()
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](3).eval()
    with pytest.raises(ValueError, match=f"a TargetConv{dims}d can't be fused with the batch normalisation after it"):
        nn.utils.fuse_conv_bn_eval(layer, norm)
    nn.utils.fuse_conv_bn_eval(CONVOLUTIONS[dims](2, 3, 3).eval(), norm)
    weight = nn.Parameter(torch.ones_like(layer.weight))
    layer.weight = weight  # as anyone may
    assert layer.weight is weight


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (TargetConv1d(2, 3, 3), {"loc", "scale"}),
        (TargetConv2d(2, 3, 3), {"loc", "scale"}),
        (TargetConv3d(2, 3, 3), {"loc", "scale"}),
        (AttentiveRegularization2d(3, attention="gaussian", rho=0.3), {"loc", "scale"}),
        (AttentiveRegularization2d(3, attention="gaussian", learn_rho=True), {"loc", "scale", "rho"}),
    ],
    ids=["1d", "2d", "3d", "rho", "learned rho"],
)
def test_no_weight_decay(layer: RoiLayer, names: set[str]) -> None:
    assert layer.no_weight_decay() == names
    assert names <= dict(layer.named_parameters()).keys()


@pytest.mark.parametrize(
    "changed",
    [
        {"loc": torch.zeros(3)},
        {"loc": torch.full((2, 1), 0.5)},
        {"scale": torch.ones(3, 3)},
        {"loc": torch.full((2, 3), 0.5, dtype=torch.float64)},
        {"scale": torch.ones(2, 3, device="meta")},
        {"loc": torch.zeros(2, 3, dtype=torch.complex64), "scale": torch.ones(2, 3, dtype=torch.complex64)},
    ],
    ids=["dims", "channels", "axes", "type", "device", "complex"],
)
@pytest.mark.parametrize("method", ["rois", "window", "project_"])
@pytest.mark.parametrize("kind", [TargetConv2d, AttentiveRegularization2d])
def test_loc_and_scale_that_do_not_fit(kind: type[RoiLayer], method: str, changed: dict[str, Tensor]) -> None:
    layer = AttentiveRegularization2d(3) if kind is AttentiveRegularization2d else TargetConv2d(1, 3, 3)
    for name, value in changed.items():
        setattr(layer, name, nn.Parameter(value))
    message = rf"loc and scale of {kind.__name__} must be of shape \[2, 3\], of one .*: loc is \["
    with pytest.raises(ValueError, match=message):
        getattr(layer, method)((5, 6))


def test_repr() -> None:
    text = repr(TargetConv2d(2, 3, (3, 5), padding=1, min_size="kernel", block=2))
    assert text == (
        "TargetConv2d(2, 3, kernel_size=(3, 5), stride=(1, 1), padding=(1, 1), "
        "attention=cauchy, scale_unit=0.5, min_size=(3, 5), clip=True, block=2, engine=auto)"
    )
    text = repr(AttentiveRegularization1d(4, attention="gaussian", scale_unit=1.0))
    assert text == ("AttentiveRegularization1d(4, attention=gaussian, scale_unit=1.0, min_size=3, clip=False, block=0)")


@pytest.mark.parametrize("rho", [-0.7, 0.5])
@pytest.mark.parametrize("learn", [False, True])
def test_rho_window(rho: float, learn: bool) -> None:
    layer = AttentiveRegularization2d(2, attention="gaussian", rho=rho, learn_rho=learn).double()
    randomise(layer, "random", (4, 5), torch.Generator().manual_seed(0))
    assert ("rho" in dict(layer.named_parameters())) == learn
    assert "rho" in layer.state_dict()
    window = layer.window((4, 5))
    separable = reference.window((4, 5), layer.loc, layer.scale, "gaussian", 0.5)
    for c, i, j in product(range(2), range(4), range(5)):
        z = [
            ((n + 0.5) / length - layer.loc[axis, c].item()) / (0.5 * layer.scale[axis, c].item())
            for axis, (n, length) in enumerate([(i, 4), (j, 5)])
        ]
        expected = separable[c, i, j].item() * math.exp(layer.rho[c].item() * z[0] * z[1])
        assert window[c, i, j].item() == pytest.approx(expected, rel=1e-10)


def test_rho_is_projected_into_its_range() -> None:
    layer = AttentiveRegularization2d(3, attention="gaussian", learn_rho=True)
    assert layer.rho.tolist() == [0, 0, 0]
    with torch.no_grad():
        layer.rho.copy_(torch.tensor([-2.0, 0.3, 5.0]))
    layer.project_((6, 6))
    assert layer.rho.tolist() == pytest.approx([-0.99, 0.3, 0.99])


def test_min_size_of_the_kernel_limits_each_axis() -> None:
    layer = TargetConv2d(1, 4, (3, 5), min_size="kernel")
    assert layer.min_size == (3, 5)
    nn.init.zeros_(layer.scale)
    layer.project_((9, 11))
    sides = layer.rois((9, 11)).diff(dim=-1).squeeze(-1)
    assert sides.amin(dim=0).tolist() == [3, 5]
    nn.init.zeros_(layer.scale)
    layer.project_((9, 4))
    sides = layer.rois((9, 4)).diff(dim=-1).squeeze(-1)
    assert sides.amin(dim=0).tolist() == [3, 4]  # the map has no more


def test_projection_holds_a_layer_during_training() -> None:
    torch.manual_seed(0)
    layer = TargetConv2d(2, 6, 3, padding=1)
    optimiser = torch.optim.SGD(layer.parameters(), lr=5.0)
    for _ in range(10):
        optimiser.zero_grad()
        layer(torch.randn(2, 2, 9, 7)).square().mean().backward()
        optimiser.step()
        layer.project_((9, 7))
        assert layer.rois((9, 7)).diff(dim=-1).min() >= 3
        assert layer.scale.max() <= 1


def test_clipped_restores_every_layer() -> None:
    model = nn.Sequential(TargetConv1d(1, 2, 3, padding=1, clip=False), TargetConv1d(2, 2, 3, padding=1))
    for layer in roi_layers(model).values():
        randomise(layer, "pixel", (6,), torch.Generator().manual_seed(0))
    x = torch.ones(1, 1, 6)
    soft = model[0](x)
    with clipped(model):
        assert model[0](x).ne(0).sum() == 2
    assert torch.equal(model[0](x), soft)
    assert soft.ne(0).sum() > 2
    with pytest.raises(RuntimeError, match="inside"), clipped(model):
        raise RuntimeError("inside")
    assert [layer.clip for layer in model] == [False, True]


def test_roi_layers_by_name() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Sequential(TargetConv1d(2, 2, 3)), AttentiveRegularization1d(2))
    assert roi_layers(model) == {"1.0": model[1][0], "2": model[2]}
    assert roi_layers(nn.Conv1d(1, 2, 3)) == {}


TARGET = (TargetConv2d, (2, 3, 3))
REGULARIZATION = (AttentiveRegularization2d, (3,))


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (TARGET, {"attention": "cauchi"}, "unknown attention 'cauchi'; did you mean 'cauchy'"),
        (TARGET, {"attention": "box"}, "unknown attention 'box'; choose from cauchy, flat, gaussian"),
        (REGULARIZATION, {"attention": "gauss"}, "did you mean 'gaussian'"),
        (TARGET, {"scale_unit": 0}, "scale_unit=0 must be positive"),
        (TARGET, {"scale_unit": -0.5}, "scale_unit=-0.5 must be positive"),
        (TARGET, {"scale_unit": math.nan}, "scale_unit=nan must be positive"),
        (TARGET, {"min_size": 0}, "min_size=0 must be"),
        (TARGET, {"min_size": 2.5}, r"min_size=2\.5 must be"),
        (TARGET, {"min_size": True}, "min_size=True must be"),
        (TARGET, {"min_size": "kernell"}, "min_size='kernell' must be 'kernel'"),
        (REGULARIZATION, {"min_size": "kernel"}, "min_size='kernel' must be"),
        (REGULARIZATION, {"min_size": -1}, "min_size=-1 must be"),
        (TARGET, {"block": -1}, "block=-1 must not be negative"),
        (REGULARIZATION, {"attention": "gaussian", "rho": 1.0}, r"rho=1\.0 must lie within \(-1, 1\)"),
        (REGULARIZATION, {"attention": "gaussian", "rho": -1}, "rho=-1 must lie within"),
        (REGULARIZATION, {"rho": 0.2}, "rho is defined for attention='gaussian' only .* not for 'cauchy'"),
        (REGULARIZATION, {"learn_rho": True}, "rho is defined for attention='gaussian' only"),
    ],
)
def test_impossible_options(
    layer: tuple[type[nn.Module], tuple[int, ...]], options: dict[str, Any], message: str
) -> None:
    kind, arguments = layer
    with pytest.raises(ValueError, match=message):
        kind(*arguments, **options)


@pytest.mark.parametrize("size", [(5,), (5, 5, 5), (0, 5), ()])
@pytest.mark.parametrize("method", ["rois", "window", "project_"])
def test_wrong_sizes(method: str, size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"size=\(.*\) must have 2 positive numbers for TargetConv2d"):
        getattr(TargetConv2d(1, 1, 3), method)(size)


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (5, 5), (3, 5), (1, 2, 3, 5, 5), (2, 5, 5)])
def test_regularization_refuses_other_channels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"is not \[B, C, H, W\] or \[C, H, W\] with C = 3"):
        AttentiveRegularization2d(3)(torch.zeros(shape))


def test_regularization_names_its_axes() -> None:
    with pytest.raises(ValueError, match=r"\[B, C, D, H, W\] or \[C, D, H, W\] with C = 3"):
        AttentiveRegularization3d(3)(torch.zeros(2, 4, 5, 5, 5))
    with pytest.raises(ValueError, match=r"\[B, C, W\] or \[C, W\] with C = 3"):
        AttentiveRegularization1d(3)(torch.zeros(2, 4, 5))


def test_window_uses_the_layers_function_and_unit() -> None:
    layer = TargetConv1d(1, 1, 3, attention="gaussian", scale_unit=1.0)
    assert layer.attention_function is attention_function("gaussian")
    assert layer.window((1,)).tolist() == [[1]]
    assert layer.window((2,))[0].tolist() == pytest.approx([math.exp(-1 / 32)] * 2)
