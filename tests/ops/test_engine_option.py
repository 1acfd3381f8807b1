"""TargetConv2d(engine=...): every engine is the same layer, and says so where it can't be."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from engine_cases import (
    assert_near,
    assert_same_results,
    difference,
    engine_of,
    place_rois,
    python,
    results,
    targeted,
    truth,
    with_engine,
)
from torch import Tensor, nn

from tkn import TargetConv2d, build_model, targetize
from tkn.backends.cpu import backend
from tkn.backends.cpu.chain import Chain
from tkn.kept import Kept
from tkn.ops import segments, sticky
from tkn.sequential import TargetSequential


def layer(engine: str = "roi", **options: object) -> TargetConv2d:
    torch.manual_seed(0)
    made = TargetConv2d(3, 18, 3, padding=1, engine=engine, **options)
    targeted(made, seed=1)
    return made


def chain(engine: str = "roi") -> TargetSequential:
    torch.manual_seed(0)
    network = TargetSequential(
        TargetConv2d(3, 18, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        TargetConv2d(18, 5, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
    )
    targeted(network, seed=1, engine=engine)
    return network


def images(batch: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 8, 9, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [layer, chain])
@pytest.mark.compact
def test_roi_equals_dense(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    network, x = make().to(dtype), images(dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert engine_of(network(x)) == "roi"
    for ours, theirs in zip(results(network, x), results(with_engine(network, "dense"), x), strict=True):
        assert_near(ours, theirs, tolerance)


@pytest.mark.parametrize("batch", [1, 20])
def test_a_full_roi_with_a_flat_window_is_the_convolution(batch: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 20, 3, 2, 1, 1, 2)
    target = TargetConv2d(4, 20, 3, 2, 1, 1, 2, engine="roi")
    target.load_state_dict(conv.state_dict(), strict=False)
    nn.init.constant_(target.scale, torch.inf)
    x = torch.randn(batch, 4, 9, 8)
    assert_near(target(x), conv(x), 1e-6)


def test_unknown_engines() -> None:
    with pytest.raises(ValueError, match="unknown engine 'rio'; did you mean 'roi'"):
        TargetConv2d(1, 1, 1, engine="rio")
    with pytest.raises(ValueError, match="unknown engine 'fast'; choose from auto, dense, roi"):
        targetize(nn.Conv2d(1, 1, 3), engine="fast")


def test_the_engine_is_said_and_passed_on() -> None:
    assert TargetConv2d(1, 1, 1).engine == "auto"
    assert "engine=roi" in repr(TargetConv2d(1, 1, 1, engine="roi"))
    made = targetize(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), engine="roi")
    assert type(made) is TargetSequential
    assert made[0].engine == "roi"
    model = build_model("tdn10", (1, 12, 12), 3, engine="dense")
    assert {m.engine for m in model.modules() if isinstance(m, TargetConv2d)} == {"dense"}


REFUSED = {
    "meta": (lambda: layer().to("meta"), lambda: images().to("meta"), "no ROI engine for meta"),
    "mixed": (lambda: layer().double(), images, "parameters of the input's type, torch.float32"),
    "mixed input": (layer, lambda: images().double(), "parameters of the input's type, torch.float64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_roi_engine_refuses(name: str) -> None:
    make, make_images, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"engine='roi'.*{re.escape(message)}"):
        make()(make_images())


@pytest.mark.parametrize("name", REFUSED)
def test_auto_is_torch_there(name: str) -> None:
    make, make_images, _ = REFUSED[name]
    auto, dense, x = with_engine(make(), "auto"), with_engine(make(), "dense"), make_images()
    if name.startswith("mixed"):
        with pytest.raises(RuntimeError) as theirs:
            dense(x)
        with pytest.raises(RuntimeError, match=re.escape(str(theirs.value))):
            auto(x)
    elif name == "meta":
        assert auto(x).shape == (5, 18, 8, 9)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_parameter_of_another_type(part: str) -> None:
    odd = layer()
    getattr(odd, part).data = getattr(odd, part).data.double()
    with pytest.raises(ValueError, match="parameters of the input's type"):
        odd(images())


@pytest.mark.parametrize("part", ["loc", "scale"])
def test_loc_and_scale_may_be_of_another_type(part: str) -> None:
    odd = layer()
    getattr(odd, part).data = getattr(odd, part).data.double()
    assert_same_results(odd, images())


@pytest.mark.parametrize("make", [layer, chain])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_networks_in_halves(make: Callable[..., nn.Module], kind: torch.dtype) -> None:
    """Sums in float32, results in halves: about as near as torch's."""
    network, x = make().to(kind), images().to(kind)
    ours, theirs = results(network, x), results(with_engine(network, "dense"), x)
    expected = results(truth(network), x.double())
    assert engine_of(network(x)) == "roi"
    assert ours[0].dtype == kind
    for one, other, right in zip(ours, theirs, expected, strict=True):
        assert one.dtype == other.dtype
        assert difference(one, right) <= 2 * difference(other, right) + torch.finfo(kind).eps


@pytest.mark.parametrize("engine", ["roi", "auto"])
@pytest.mark.parametrize(
    "shape", [(4, 8, 9), (2, 4, 8, 9), (3, 8), (1, 2, 3, 8, 9), (8, 9)], ids=lambda shape: "x".join(map(str, shape))
)
def test_wrong_shapes_are_torchs_errors(engine: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    with pytest.raises((RuntimeError, IndexError, ValueError)) as theirs:
        layer("dense")(x)
    with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value))):
        layer(engine)(x)


def test_wrong_channels_between_layers_are_torchs_error() -> None:
    def network(engine: str) -> TargetSequential:
        return TargetSequential(
            TargetConv2d(3, 8, 3, engine=engine), nn.ReLU(), TargetConv2d(4, 5, 3, padding=1, engine=engine)
        )

    with pytest.raises(RuntimeError, match=r"expected input.* to have 4 channels, but got 8"):
        network("dense")(images())
    with pytest.raises(RuntimeError, match=r"expected input.* to have 4 channels, but got 8"):
        network("roi")(images())


@pytest.mark.parametrize("engine", ["dense", "roi"])
def test_a_kernel_larger_than_the_image(engine: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"[Kk]ernel"):
        TargetConv2d(3, 4, 12, engine=engine)(images())
    with pytest.raises((RuntimeError, ValueError), match=r"[Kk]ernel"):
        TargetSequential(TargetConv2d(3, 4, 3, engine=engine), TargetConv2d(4, 4, 12, engine=engine))(images())


@pytest.mark.parametrize("engine", ["dense", "roi"])
def test_a_pooling_larger_than_the_map(engine: str) -> None:
    network = TargetSequential(TargetConv2d(3, 4, 3, padding=1, engine=engine), nn.MaxPool2d(10))
    with pytest.raises((RuntimeError, ValueError)):
        network(images())


@pytest.mark.parametrize("make", [layer, chain])
def test_unbatched_and_empty(make: Callable[..., nn.Module]) -> None:
    network = make()
    x = images()
    assert_near(network(x[0]), network(x)[0])
    empty = network(x[:0])
    assert empty.shape == (0, *network(x).shape[1:])
    empty.sum().backward()
    assert all(parameter.grad.eq(0).all() for parameter in network.parameters())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat((x, x), dim=3)[..., 1 : 1 + x.shape[3]],
    "every second": lambda x: torch.cat((x, x, x), dim=2)[:, :, ::2][:, :, : x.shape[2]],
    "transposed": lambda x: torch.cat((x, x), dim=2)[:, :, : x.shape[3]].transpose(2, 3),
    "batch moved": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded channels": lambda x: x[:, :1].expand(x.shape),
    "one number": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("batch", [1, 5, pytest.param(20, marks=pytest.mark.compact)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_input(name: str, batch: int) -> None:
    x = LAYOUTS[name](images(batch))
    assert batch == 1 or not x.is_contiguous()
    network = chain()
    expected = results(truth(network), x.double())
    for ours, theirs in zip(results(network, x), expected, strict=True):
        assert_near(ours, theirs)


def test_channels_last_weights_give_channels_last_results() -> None:
    ours = layer().to(memory_format=torch.channels_last)
    theirs = with_engine(ours, "dense")
    x = images().to(memory_format=torch.channels_last).requires_grad_()
    assert theirs(x).is_contiguous(memory_format=torch.channels_last)
    assert ours(x).is_contiguous(memory_format=torch.channels_last)
    assert_same_results(ours, x.detach())
    assert_same_results(chain().to(memory_format=torch.channels_last), x.detach())


def test_without_clipping() -> None:
    soft = layer(clip=False)
    assert engine_of(soft(images())) == "roi"
    assert_near(soft(images()), nn.functional.conv2d(images(), soft.weight, soft.bias, padding=1) * soft.window((8, 9)))


@pytest.mark.parametrize("make", [layer, chain])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast(make: Callable[..., nn.Module], kind: torch.dtype) -> None:
    """Sums in float32, an output of autocast's type."""
    network, x = make(), images().to(kind)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(x)
        output.float().square().sum().backward()
    assert engine_of(network(images())) == "roi"
    assert_near(output.float(), truth(network)(x.double()), 0.01)
    assert x.grad.dtype == kind
    assert all(parameter.grad.dtype == torch.float32 for parameter in network.parameters())


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_autocast_of_layers_of_other_types(kind: torch.dtype) -> None:
    """Either refused or right, never numbers of one type read as another's."""
    odd = layer().to(kind)
    for x in (images(), images().to(kind)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            try:
                output = odd(x)
            except (ValueError, RuntimeError):
                continue
        assert_near(output.float(), truth(odd)(x.double()), 0.05)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["rows", "last"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_the_output_under_autocast_is_as_torchs(kind: torch.dtype, memory_format: torch.memory_format) -> None:
    networks = [layer(engine).to(memory_format=memory_format) for engine in ("roi", "dense")]
    with torch.autocast("cpu", dtype=kind):
        ours, theirs = (network(images()) for network in networks)
    assert engine_of(ours) == "roi"
    assert ours.dtype == theirs.dtype == kind
    assert ours.stride() == theirs.stride()
    assert_near(ours, theirs, 0.01)


def test_auto_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else it follows from how fast this machine was when the kernels were built.
    monkeypatch.setattr(backend, "seconds", lambda engine, _: 2.0 if engine == "roi" else 1.0)
    monkeypatch.setattr(sticky, "_choices", Kept(4096))
    ours, theirs = chain("auto"), chain("dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(images()), theirs(images()))


def test_hooks_fire_and_change_nothing_else() -> None:
    network, x = chain(), images()
    expected, theirs = network(x), results(truth(network), x.double())
    seen: list[tuple[str, tuple[int, ...]]] = []
    for position, module in enumerate(network):
        module.register_forward_hook(
            lambda _module, _inputs, output, position=position: seen.append((f"{position}", tuple(output.shape)))
        )
    assert_near(network(x), expected)
    shapes = [(5, 18, 8, 9)] * 2 + [(5, 18, 4, 4)] + [(5, 5, 4, 4)] * 2 + [(5, 5, 2, 2)]
    assert seen == [(f"{position}", shape) for position, shape in enumerate(shapes)]
    for one, other in zip(results(network, x), theirs, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward pre"])
def test_a_hook_on_one_layer(position: int, kind: str) -> None:
    network, x = chain(), images()
    expected = results(network, x)
    calls = []
    register = {
        "forward": network[position].register_forward_hook,
        "pre": network[position].register_forward_pre_hook,
        "backward": network[position].register_full_backward_hook,
        "backward pre": network[position].register_full_backward_pre_hook,
    }[kind]
    handle = register(lambda *_: calls.append(position))
    for one, other in zip(results(network, x), expected, strict=True):
        assert_near(one, other, 1e-6)
    assert calls == [position]
    handle.remove()
    network(x)
    assert calls == [position]


def test_a_hook_that_changes_the_output() -> None:
    network, x = chain(), images()
    network[0].register_forward_hook(lambda _module, _inputs, output: output + 1)
    dense = truth(network)  # with the hook
    assert_near(network(x), dense(x.double()))


def test_hooks_on_all_modules() -> None:
    network, x = chain(), images()
    expected, calls = network(x), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    try:
        assert_near(network(x), expected)
    finally:
        handle.remove()
    assert calls == [*(type(module).__name__ for module in network), "TargetSequential"]


class Doubled(TargetConv2d):
    """A user's own layer."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_subclasses_with_a_forward_of_their_own() -> None:
    network = TargetSequential(Doubled(3, 4, 3, engine="roi"), nn.ReLU())
    assert_near(network(images()), 2 * nn.functional.relu(TargetConv2d.forward(network[0], images())))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("make", [layer, chain])
def test_copies(make: Callable[..., nn.Module], duplicate: Callable[[nn.Module], nn.Module]) -> None:
    network, x = make(), images()
    before = network(x)
    copied = duplicate(network)
    assert repr(copied) == repr(network)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    assert_near(copied(x), truth(copied)(x.double()))
    assert torch.equal(network(x), before)


def test_state_dict_is_as_before() -> None:
    ours, theirs = layer("roi"), TargetConv2d(3, 18, 3, padding=1, engine="dense")
    assert list(ours.state_dict()) == ["weight", "bias", "loc", "scale"]
    theirs.load_state_dict(ours.state_dict())
    assert_near(ours(images()), theirs(images()))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows with every call of the kernels."""
    calls: list[str] = []
    forward = Chain.forward
    monkeypatch.setattr(Chain, "forward", lambda self, *args: (calls.append("chain"), forward(self, *args))[1])
    return calls


@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize("make", [layer, chain])
def test_compiled_and_exported_layers_compute_inside_their_rois(
    make: Callable[..., nn.Module], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = make().eval(), images()
    expected = truth(network)(x.double())
    calls = counted(monkeypatch)
    with torch.no_grad():
        if how == "compile":
            assert_near(torch.compile(network, backend="eager", fullgraph=True)(x), expected)
        else:
            assert_near(torch.export.export(network, (x,)).module()(x), expected)
    assert calls == ["chain"]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning", "ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [layer, chain])
def test_torchscript_knows_torchs_operations_alone(
    make: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = make().eval(), images()
    calls = counted(monkeypatch)
    with torch.no_grad():
        traced = torch.jit.trace(network, x, check_trace=False)
        assert "tkn::" not in str(traced.inlined_graph)
        assert_near(traced(x), truth(network)(x.double()))
    assert not calls


def test_function_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto is torch's where the engine's functions can't be transformed."""
    names = ("weight", "bias", "loc", "scale")
    auto = layer("auto")
    x = images()
    monkeypatch.setattr(segments, "is_faster", lambda *_: True)
    assert engine_of(auto(x)) == "roi"

    def loss(parameters: dict[str, Tensor], network: nn.Module) -> Tensor:
        return torch.func.functional_call(network, parameters, x).square().sum()

    gradients = torch.func.grad(loss)({name: getattr(auto, name).detach() for name in names}, auto)
    auto(x).square().sum().backward()
    for name in names:
        assert_near(gradients[name], getattr(auto, name).grad)


def test_two_forwards_before_a_backward() -> None:
    network = chain()
    first, second = images(5), images(5) * 2 - 1
    theirs = truth(network)
    ours_both = (network(first), network(second))
    theirs_both = (theirs(first.double()), theirs(second.double()))
    for ours, other in zip(reversed(ours_both), reversed(theirs_both), strict=True):
        ours.square().sum().backward()
        other.square().sum().backward()
    for ours, other in zip(network.parameters(), theirs.parameters(), strict=True):
        assert_near(ours.grad, other.grad)


def test_two_networks_of_one_layer() -> None:
    """A layer used twice in one graph, on maps of two sizes."""
    torch.manual_seed(0)
    shared = TargetConv2d(3, 3, 3, padding=1, engine="roi")
    targeted(shared, seed=1)
    network = TargetSequential(shared, nn.ReLU(), nn.MaxPool2d(2), shared, nn.ReLU())
    x = images()
    assert_near(network(x), truth(network)(x.double()))
    network(x).square().sum().backward()
    theirs = truth(network)
    theirs.zero_grad()
    theirs(x.double()).square().sum().backward()
    for ours, other in zip(network.parameters(), theirs.parameters(), strict=True):
        assert_near(ours.grad, other.grad)


def test_retained_graphs_give_the_same_gradients_again() -> None:
    network = chain()
    x = images().requires_grad_()
    output = network(x).square().sum()
    inputs = [x, *network.parameters()]
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    second = torch.autograd.grad(output, inputs)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [layer, chain])
def test_rois_that_move_are_seen(make: Callable[..., nn.Module]) -> None:
    network, x = make().eval(), images()  # in training it would warn of ROIs that were not projected
    first = network(x)
    seen = [first]
    for seed in range(8):  # more states than are kept
        targeted(network, seed=seed + 10)
        assert_same_results(network, x)
        seen.append(network(x))
    targeted(network, seed=1)
    assert torch.equal(network(x), first)
    assert not any(torch.equal(one, first) for one in seen[1:])
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("weight"):  # they too
                parameter.add_(0.01)
    assert_same_results(network, x)


def test_clip_that_changes_is_seen() -> None:
    changing, x = layer(), images()
    clipped = changing(x)
    changing.clip = False
    assert_near(changing(x), truth(changing)(x.double()))
    changing.clip = True
    assert torch.equal(changing(x), clipped)


def test_alternating_batches_and_sizes() -> None:
    network = chain()
    for batch, size in ((1, 8), (40, 8), (7, 11), (1, 8), (17, 6), (40, 8)):
        x = torch.randn(batch, 3, size, size + 1, generator=torch.Generator().manual_seed(size))
        assert_near(network(x), truth(network)(x.double()))


@pytest.mark.parametrize("make", [layer, chain])
def test_inference_mode_and_then_training(make: Callable[..., nn.Module]) -> None:
    network, x = make(), images()
    with torch.inference_mode():
        inferred = network(x)
    assert inferred.is_inference()
    assert_same_results(network, x)
    assert torch.equal(inferred, network(x).detach())
    with torch.no_grad():
        assert not network(x).requires_grad


def test_diverged_parameters_do_not_stop_the_engine() -> None:
    network, x = chain(), images()
    place_rois(network[0], "pixel", (8, 9), 0)
    with torch.no_grad():
        network[0].loc[0, 3] = torch.nan
        network[3].scale[1, 2] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(x).sum().backward()
    assert network[3].weight.grad.shape == network[3].weight.shape


@pytest.mark.parametrize(
    ("mode", "default"),
    [("inference_mode()", "float32"), ("autocast('cpu', dtype=torch.bfloat16)", "float32"), ("no_grad()", "float64")],
)
def test_the_first_use_may_be_anywhere(mode: str, default: str, fresh_check: str) -> None:
    """The kernels are checked at their first use, in whatever mode that is."""
    code = f"""
import json, warnings, torch
from tkn import TargetConv2d
layer = TargetConv2d(2, 20, 3, padding=1, engine="roi")
x = torch.rand(3, 2, 8, 8)
torch.set_default_dtype(torch.{default})
with warnings.catch_warnings(record=True) as caught, torch.{mode}:
    warnings.simplefilter("always")
    y = layer(x)
layer.engine = "dense"
print(json.dumps([[str(w.message) for w in caught], float((y - layer(x)).abs().max())]))
"""
    caught, error = python(code, TKN_CACHE_DIR=fresh_check)
    assert caught == []
    assert error < (0.01 if "autocast" in mode else 1e-5)
