"""`targetize`: which convolutions it replaces, and what it leaves as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models import resnet18

from tkn import TargetConv1d, TargetConv2d, TargetConv3d, count_macs, scale_penalty, targetize
from tkn.layers import RoiLayer, roi_layers

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TARGETS = {1: TargetConv1d, 2: TargetConv2d, 3: TargetConv3d}
SIZE = (8, 7, 6)


def plain_cnn(dims: int = 2) -> nn.Sequential:
    """Convolutions "0" (5 wide, with bias), "2.0" (3 wide, strided) and the pointwise "2.2"."""
    torch.manual_seed(dims)
    conv = CONVOLUTIONS[dims]
    inner = nn.Sequential(conv(4, 6, 3, stride=2, padding=1, groups=2, bias=False), nn.ReLU(), conv(6, 3, 1))
    return nn.Sequential(conv(2, 4, 5, padding=2), nn.ReLU(), inner)


def image(dims: int = 2) -> Tensor:
    return torch.randn(2, 2, *SIZE[:dims], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_default_is_every_kernel_larger_than_a_pixel(dims: int) -> None:
    targeted = targetize(plain_cnn(dims))
    assert list(roi_layers(targeted)) == ["0", "2.0"]
    assert type(targeted[0]) is type(targeted[2][0]) is TARGETS[dims]
    assert type(targeted[2][2]) is CONVOLUTIONS[dims]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["2.2"], ["2.2"]),
        ("0", ["0"]),
        ("all", ["0", "2.0", "2.2"]),
        ({"2.0", "0"}, ["0", "2.0"]),
        (iter(("2.0", "2.2")), ["2.0", "2.2"]),
        (lambda name, _module: name.startswith("2"), ["2.0", "2.2"]),
        (lambda _name, module: module.in_channels == 2, ["0"]),
    ],
    ids=["list", "string", "all", "set", "iterator", "by name", "by module"],
)
def test_choice(layers: Any, expected: list[str]) -> None:
    assert list(roi_layers(targetize(plain_cnn(), layers))) == expected


def test_callable_sees_plain_convolutions_only() -> None:
    seen = {}
    targetize(targetize(plain_cnn(), ["0"]), lambda name, module: seen.setdefault(name, type(module)) is nn.Conv2d)
    assert seen == {"2.0": nn.Conv2d, "2.2": nn.Conv2d}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_computes_what_the_network_did(dims: int) -> None:
    model = plain_cnn(dims)
    targeted = targetize(model, "all", engine="dense")
    assert len(roi_layers(targeted)) == 3
    assert torch.equal(targeted(image(dims)), model(image(dims)))
    inside = targetize(model, "all", engine="roi")
    torch.testing.assert_close(inside(image(dims)), model(image(dims)), rtol=1e-6, atol=1e-6)


def test_a_trained_resnet_computes_what_it_did() -> None:
    """In training and in evaluation, to the bit, with gradients to every weight; the paper's windows change it."""
    torch.manual_seed(0)
    model = resnet18(num_classes=5)
    x = torch.randn(4, 3, 40, 36)
    for _ in range(3):
        model(x)  # as if trained: normalisations with statistics of their own
    targeted = targetize(model)
    assert {layer.attention for layer in roi_layers(targeted).values()} == {"flat"}
    for training in (False, True):
        model.train(training)
        targeted.train(training)
        expected, ours = model(x), targeted(x)
        assert torch.equal(ours, expected)
    for gradient, right in zip(
        torch.autograd.grad(
            ours.square().sum(), [targeted.get_parameter(name) for name, _ in model.named_parameters()]
        ),
        torch.autograd.grad(expected.square().sum(), list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(gradient, right)
    model.eval()
    with torch.no_grad():
        assert not torch.allclose(targetize(model, attention="cauchy")(x), model(x), rtol=0.1)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_keeps_the_convolutions_arguments(dims: int) -> None:
    model = plain_cnn(dims)
    targeted = targetize(model)
    for conv, layer in [(model[0], targeted[0]), (model[2][0], targeted[2][0])]:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        assert all(getattr(layer, name) == getattr(conv, name) for name in names)
        assert (layer.bias is None) == (conv.bias is None)


def test_a_copy_leaves_the_original_untouched() -> None:
    model = plain_cnn()
    weights, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    targeted = targetize(model)
    assert targeted is not model
    assert all(torch.equal(targeted.state_dict()[name], weight) for name, weight in weights.items())
    with torch.no_grad():
        for parameter in targeted.parameters():
            parameter.zero_()
    assert list(model.modules()) == modules
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())


def test_inplace_keeps_the_parameters_themselves() -> None:
    model = plain_cnn()
    parameters = dict(model.named_parameters())
    targeted = targetize(model, inplace=True)
    assert targeted is model
    after = dict(targeted.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert after.keys() - parameters.keys() == {"0.loc", "0.scale", "2.0.loc", "2.0.scale"}


def test_options_reach_every_layer() -> None:
    targeted = targetize(
        plain_cnn(), attention="gaussian", scale_unit=1.0, min_size="kernel", clip=False, blocks={"2.0": 2}
    )
    layers = roi_layers(targeted)
    assert {(x.attention, x.scale_unit, x.clip) for x in layers.values()} == {("gaussian", 1.0, False)}
    assert {name: x.min_size for name, x in layers.items()} == {"0": (5, 5), "2.0": (3, 3)}
    assert {name: x.block for name, x in layers.items()} == {"0": 0, "2.0": 2}
    assert scale_penalty(targeted, 1.0, 3.0).item() == 2 * (4 + 9 * 6)


class Siamese(nn.Module):
    """The same convolution under two names, in two parents."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 2, 3, padding=1)
        self.right = nn.Sequential(self.left, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.right(x))


@pytest.mark.parametrize("layers", [None, ["left"], ["right.0"], ["left", "right.0"]], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_convolution_used_twice_stays_one(layers: list[str] | None, inplace: bool) -> None:
    torch.manual_seed(0)
    model = Siamese()
    expected = model(image())
    targeted = targetize(model, layers, inplace=inplace)
    assert targeted.left is targeted.right[0]
    assert isinstance(targeted.left, TargetConv2d)
    assert len(list(targeted.parameters())) == 4
    assert torch.equal(targeted(image()), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_may_be_one_convolution(inplace: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3)
    targeted = targetize(conv, inplace=inplace)
    assert isinstance(targeted, TargetConv2d)
    assert (targeted is conv) == inplace
    assert (targeted.weight is conv.weight) == inplace
    expected = nn.functional.conv2d(image(), conv.weight, conv.bias)
    assert torch.equal(targeted(image()), expected)


@pytest.mark.parametrize("training", [True, False])
def test_keeps_mode_type_and_padding_mode(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")).double().train(training)
    model[0].weight.requires_grad_(False)
    targeted = targetize(model)
    layer = targeted[0]
    assert layer.training == training
    assert layer.padding_mode == "reflect"
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert torch.equal(targeted(image().double()), model(image().double()))


def test_in_place_the_modules_stay_the_same_objects() -> None:
    model = plain_cnn()
    modules = dict(model.named_modules())
    targetize(model, inplace=True)
    assert dict(model.named_modules()) == modules
    assert isinstance(modules["2.0"], TargetConv2d)


def seen_by_hooks(conv: nn.Conv2d) -> list[str]:
    """What the hooks of `conv`, registered here, are called for in a forward and backward pass and a state dict."""
    seen: list[str] = []
    conv.register_forward_pre_hook(lambda *_: seen.append("before"))
    conv.register_forward_hook(lambda *_: seen.append("after"))
    conv.register_full_backward_pre_hook(lambda *_: seen.append("before backward"))
    conv.register_full_backward_hook(lambda *_: seen.append("after backward"))
    conv.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    conv.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    conv.weight.register_hook(lambda _: seen.append("weight"))
    return seen


def run_forward_and_back(model: nn.Module) -> None:
    model(image().requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("engine", ["dense", "roi"])
def test_hooks_stay(engine: Any) -> None:
    model = plain_cnn()
    seen = seen_by_hooks(model[2][0])
    handle = model[2][0].register_forward_hook(lambda *_: seen.append("removed"))
    run_forward_and_back(model)
    plain = sorted(seen)
    assert len(plain) == 8
    seen.clear()
    targetize(model, engine=engine, inplace=True)
    run_forward_and_back(model)
    assert sorted(seen) == plain
    seen.clear()
    handle.remove()
    model(image())
    assert seen == ["before", "after"]


def test_hooks_of_a_copy_are_those_that_torch_copies() -> None:
    model = plain_cnn()
    seen: list[str] = []
    model[2][0].register_forward_hook(lambda *_: seen.append("after"))
    targetize(model)(image())
    assert seen == ["after"]


@pytest.mark.parametrize("inplace", [False, True])
def test_attributes_and_buffers_stay(inplace: bool) -> None:
    model = plain_cnn()
    conv = model[2][0]
    conv.name_of_the_users = ["kept"]
    conv.register_buffer("calls", torch.tensor(3))
    conv.register_parameter("gain", nn.Parameter(torch.ones(2)))
    conv.sub = nn.Linear(1, 1)
    targeted = targetize(model, inplace=inplace)
    layer = targeted[2][0]
    assert layer.name_of_the_users == ["kept"]
    assert layer.calls.item() == 3
    assert list(layer.state_dict()) == ["weight", "gain", "loc", "scale", "calls", "sub.weight", "sub.bias"]


@pytest.mark.parametrize("inplace", [False, True])
def test_parameters_stay_as_they_are(inplace: bool) -> None:
    model = plain_cnn().to(torch.bfloat16, memory_format=torch.channels_last)
    model[2][0].weight.requires_grad_(False)
    targeted = targetize(model, inplace=inplace)
    layer = targeted[2][0]
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert not layer.weight.is_contiguous()
    assert {p.dtype for p in targeted.parameters()} == {torch.bfloat16}
    assert not layer.weight.requires_grad
    assert layer.loc.requires_grad  # what the user did not freeze
    assert layer.scale.requires_grad


def test_a_model_on_the_meta_device_gets_its_values_later() -> None:
    with torch.device("meta"):
        model = plain_cnn()
    targeted = targetize(model)
    assert {p.device.type for p in targeted.parameters()} == {"meta"}
    targeted.to_empty(device="cpu")
    for module in targeted.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert targeted[0].rois((4, 5)).tolist() == [[[0, 4], [0, 5]]] * 4
    assert targeted(image()).isfinite().all()


def test_a_default_device_changes_nothing() -> None:
    with torch.device("meta"):
        targeted = targetize(plain_cnn().to_empty(device="cpu"))
    assert {p.device.type for p in targeted.parameters()} == {"cpu"}
    assert targeted[0].scale.eq(1).all()


def test_conversion_draws_no_random_numbers() -> None:
    model = plain_cnn()
    state = torch.get_rng_state()
    targetize(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["scale", "loc", "block", "rois", "attention", "engine"])
def test_attributes_that_a_target_layer_would_overwrite(name: str) -> None:
    model = plain_cnn()
    setattr(model[2][0], name, 0.5)
    with pytest.raises(ValueError, match=rf"layer '2\.0' has attributes that a target layer needs: {name}$"):
        targetize(model, inplace=True)
    assert roi_layers(model) == {}


def test_a_forward_of_the_instances_own_is_refused() -> None:
    model = plain_cnn()
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="layer '0' has attributes that a target layer needs: forward"):
        targetize(model)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dense_checkpoints_load_into_targeted_networks(dims: int) -> None:
    model, targeted = plain_cnn(dims), targetize(plain_cnn(dims))
    with torch.no_grad():
        for parameter in (*model.parameters(), *targeted.parameters()):
            parameter.normal_()
    assert targeted.load_state_dict(model.state_dict(), strict=True) == ([], [])
    assert all(torch.equal(targeted.state_dict()[name], value) for name, value in model.state_dict().items())
    assert all(layer.loc.eq(0.5).all() and layer.scale.eq(1).all() for layer in roi_layers(targeted).values())


class Named(nn.Module):
    """As timm's models: it names parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 2, 8, 7))
        self.body = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + self.position)

    def no_weight_decay(self) -> set[str]:
        return {"position"}


MAKERS: dict[str, Any] = {
    "sequential": (plain_cnn, {"0.loc", "0.scale", "2.0.loc", "2.0.scale"}),
    "named": (Named, {"position", "body.0.loc", "body.0.scale", "body.2.loc", "body.2.scale"}),
    "one convolution": (lambda: nn.Conv2d(2, 2, 3), {"loc", "scale"}),
    "used twice": (Siamese, {"left.loc", "left.scale"}),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["", "copy", "pickle"],
)
def test_no_weight_decay_names_loc_and_scale(kind: str, inplace: bool, duplicate: Any) -> None:
    make, names = MAKERS[kind]
    targeted = targetize(make(), inplace=inplace)
    duplicated = duplicate(targeted)
    assert type(duplicated) is type(targeted)
    assert duplicated.no_weight_decay() == names
    assert names <= dict(duplicated.named_parameters()).keys()
    duplicated.no_weight_decay().clear()
    assert duplicated.no_weight_decay() == names
    assert torch.equal(duplicated(image()), targeted(image()))


def test_no_weight_decay_after_a_second_conversion() -> None:
    targeted = targetize(targetize(Named(), ["body.0"]), ["body.2"])
    assert targeted.no_weight_decay() == MAKERS["named"][1]
    assert Named().no_weight_decay() == {"position"}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "nothing to target: Sequential has no convolution that `layers` chooses"),
        (lambda _name, _module: False, "nothing to target"),
        (["2.1"], r"layer '2\.1' is a ReLU, not a plain nn\.Conv1d, nn\.Conv2d or nn\.Conv3d"),
        (["0", "2"], "layer '2' is a Sequential, not a plain"),
        (["2.00"], r"unknown layer '2\.00'; did you mean '2\.0'\?"),
        (["encoder"], r"unknown layer 'encoder'; choose from 0, 2\.0, 2\.2"),
    ],
)
def test_impossible_choices(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        targetize(plain_cnn(), layers)


def test_nothing_but_pointwise_convolutions() -> None:
    with pytest.raises(ValueError, match="nothing to target"):
        targetize(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(2, 2)))


def test_target_layers_are_not_targeted_twice() -> None:
    with pytest.raises(ValueError, match="layer '0' is a TargetConv2d, not a plain"):
        targetize(targetize(plain_cnn()), ["0"])


@pytest.mark.parametrize(
    ("name", "message"), [("2.00", "did you mean '2.0'"), ("2.2", "unknown layer in blocks '2.2'")]
)
def test_blocks_must_name_chosen_layers(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        targetize(plain_cnn(), blocks={name: 1})


def test_a_failed_conversion_in_place_changes_nothing() -> None:
    model = plain_cnn()
    with pytest.raises(ValueError, match="did you mean 'cauchy'"):
        targetize(model, attention="cauchyy", inplace=True)
    assert roi_layers(model) == {}


def test_resnet18_converts_counts_and_trains() -> None:
    torch.manual_seed(0)
    model = resnet18(weights=None, num_classes=5)
    targeted = targetize(model)
    layers = roi_layers(targeted)
    assert len(layers) == 17  # all but the three 1x1 shortcuts
    assert all(isinstance(layer, RoiLayer) and max(layer.kernel_size) > 1 for layer in layers.values())

    x = torch.randn(2, 3, 32, 64)
    plain, targets = count_macs(model, (3, 32, 64)), count_macs(targeted, (3, 32, 64))
    assert plain.unknown == targets.unknown == ()
    assert plain.total_dense == targets.total_dense == targets.total_roi
    kernels = sum(layer.out_channels for layer in layers.values())
    assert targets.parameters == plain.parameters + 4 * kernels

    optimiser = torch.optim.SGD(targeted.parameters(), lr=0.1)
    loss = targeted(x).square().mean() + scale_penalty(targeted, 1e-2)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in targeted.parameters())
    optimiser.step()
    assert all(layer.scale.ne(1).all() for layer in layers.values())
    model.eval()
    targeted = targetize(model)
    with torch.no_grad():
        assert torch.equal(targeted(x), model(x))


def test_a_weight_that_is_no_parameter_is_refused() -> None:
    model = plain_cnn()
    prune.identity(model[0], "weight")
    with pytest.raises(ValueError, match="is not a plain parameter"):
        targetize(model, ["0"], inplace=True)


def test_a_small_share_is_told() -> None:
    """Of 1x1 convolutions that the default leaves dense."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 40, 1), nn.Conv2d(40, 40, 1))
    share = 1 * 2 * 9 / (1 * 2 * 9 + 2 * 40 + 40 * 40)
    with pytest.warns(
        UserWarning, match=r"target layers do 1% of the multiply-adds of TargetSequential .*layers='all'"
    ):
        targeted = targetize(model, input_size=(1, 5, 5))
    assert count_macs(targeted, (1, 5, 5)).targeted_share == pytest.approx(share)
    assert count_macs(targetize(model, "all", input_size=(1, 5, 5)), (1, 5, 5)).targeted_share == 1
    assert count_macs(model, (1, 5, 5)).targeted_share == 0


def test_a_layer_that_is_called_all() -> None:
    model = nn.Sequential()
    model.add_module("all", nn.Conv2d(1, 2, 1))
    model.add_module("other", nn.Conv2d(2, 2, 3))
    assert list(roi_layers(targetize(model, "all"))) == ["all"]
