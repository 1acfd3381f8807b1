"""A batch normalisation, a ReLU and a target convolution in one: float64's results, or the modules' to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_cases import place_rois
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tkn import TargetConv2d, build_model
from tkn.backends.cpu import normed as kernels_of_it
from tkn.backends.cpu.build import EngineUnavailable, kernels
from tkn.normed import normed_sequential
from tkn.ops.normed import reference

#: Maps and gradients are rounded to 8 bits, sums are not.
TOLERANCE = 0.006


def there() -> bool:
    """Whether this build of the kernels multiplies bfloat16; else the plain modules must come to the same."""
    return bool(kernels(torch.float32).tkn_bfloat16())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernels are called for."""
    made: list[str] = []
    for name in ("forward", "backward"):
        function = getattr(kernels_of_it, name)
        monkeypatch.setattr(
            kernels_of_it, name, lambda *args, name=name, function=function: (made.append(name), function(*args))[1]
        )
    return made


def layers(channels: int, outputs: int, size: tuple[int, int] = (9, 8), rois: str = "random", **options: Any) -> Any:
    """Norm, ReLU and target layer, with parameters that need no rounding where products round them."""
    torch.manual_seed(0)
    settings = {"padding": 1, "bias": False, "engine": "roi", **options}
    made = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), TargetConv2d(channels, outputs, 3, **settings))
    with torch.no_grad():
        made[0].weight.uniform_(0.5, 1.5)
        made[0].bias.uniform_(-0.5, 0.5)
        made[2].weight.copy_(made[2].weight.bfloat16())
    place_rois(made[2], rois, size, seed=1)
    return made


def images(batch: int, channels: int, size: tuple[int, int] = (9, 8)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (1 + torch.randn(batch, channels, *size, generator=generator)).bfloat16()


def step(made: nn.Sequential, x: Tensor, forward: Callable[..., Tensor] = normed_sequential) -> list[Tensor]:
    """Under autocast unless in float64: y and the gradients of x and of all parameters; the moved averages."""
    made, x = copy.deepcopy(made), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
        y = forward(made, x)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    grads = torch.autograd.grad(y, [x, *made.parameters()], up)
    return [y.detach(), *grads, *(buffer.double() for buffer in made.buffers())]


def plain(made: nn.Sequential, x: Tensor) -> Tensor:
    return made(x)


def dense(made: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The slow reference: torch's modules in float64."""
    made = copy.deepcopy(made).double()
    made[2].engine = "dense"
    return step(made, x.double(), plain)


def error(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other).norm() / other.norm().clamp(min=1e-30))


@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "size", "rois"),
    [
        pytest.param(1, 17, 3, (5, 9), "random", marks=pytest.mark.compact),
        pytest.param(3, 5, 7, (7, 7), "border", marks=pytest.mark.compact),
        pytest.param(2, 4, 4, (33, 35), "full", marks=pytest.mark.compact),
        (2, 1, 1, (5, 9), "full"),
        (5, 24, 12, (14, 14), "pixel"),
        (4, 36, 12, (28, 28), "random"),
        (17, 16, 5, (14, 14), "edge"),
        (3, 9, 11, (56, 56), "random"),
        (2, 3, 2, (1, 40), "full"),
        (2, 3, 2, (40, 1), "border"),
    ],
)
@pytest.mark.parametrize("attention", ["cauchy", "gaussian"])
def test_float64s_results(
    batch: int, channels: int, outputs: int, size: tuple[int, int], rois: str, attention: str, calls: list[str]
) -> None:
    made, x = layers(channels, outputs, size, rois, attention=attention), images(batch, channels, size)
    found, expected = step(made, x), dense(made, x)
    assert calls == (["forward", "backward"] if there() else [])
    names = ["y", "x", "norm.weight", "norm.bias", "weight", "loc", "scale"]
    for name, one, other in zip(names, found, expected, strict=False):
        # Gradients of loc and scale are differences of large sums.
        most = 5 * TOLERANCE if name in ("loc", "scale") else TOLERANCE
        # Torch's modules round once more, before the window.
        assert error(one, other) < (most if there() else 5 * TOLERANCE), name
    for one, other in zip(found[-3:], expected[-3:], strict=True):
        assert error(one, other) < 1e-5


@pytest.mark.parametrize("seed", range(12))
def test_random_layers(seed: int, calls: list[str]) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    size, channels, outputs = (pick(3, 40), pick(3, 40)), pick(1, 40), pick(1, 20)
    made, x = layers(channels, outputs, size), images(pick(1, 18), channels, size)
    place_rois(made[2], "random", size, seed)
    for one, other in zip(step(made, x)[:5], dense(made, x)[:5], strict=True):
        assert error(one, other) < TOLERANCE
    assert bool(calls) == there()


@pytest.mark.compact
def test_empty_rois_and_windows_that_underflow(calls: list[str]) -> None:
    """A kernel without pixels gives zeros and takes none; far pixels of a narrow window divide nothing by nothing."""
    made, x = layers(6, 4, attention="gaussian", scale_unit=0.02), images(3, 6)
    with torch.no_grad():
        made[2].scale[:, 1] = 1e-4
        made[2].loc[:, 2] = torch.nan
        made[2].loc[:, 0], made[2].scale[:, 0] = 0.5, 1.0
    found = step(made, x)
    y, grad_x, weight = found[0], found[1], found[4]
    assert float(y[:, 1:3].abs().sum()) == float(weight[1:3].abs().sum()) == 0
    assert grad_x.isfinite().all()
    loc, scale = found[5], found[6]
    assert loc[:, [0, 1, 3]].isfinite().all()
    assert scale[:, [0, 1, 3]].isfinite().all()
    assert bool(calls) == there()


@pytest.mark.compact
def test_all_rois_empty() -> None:
    made, x = layers(5, 3), images(2, 5)
    with torch.no_grad():
        made[2].scale.fill_(1e-6)
    assert all(float(found.abs().sum()) == 0 for found in step(made, x)[:5])


def test_nan_goes_where_torchs_goes(calls: list[str]) -> None:
    made, x = layers(6, 4, rois="full"), images(3, 6)
    x[1, 2, 3, 3] = torch.nan
    for one, other in zip(step(made, x)[:7], dense(made, x)[:7], strict=True):
        assert torch.equal(one.isnan(), other.isnan())
    assert bool(calls) == there()


def test_the_layer_remembers_its_maps(calls: list[str]) -> None:
    made, x = layers(5, 4), images(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        normed_sequential(made, x)
    assert made[2].map_size == (9, 8)
    assert calls == ["forward"] * there()


def test_the_same_bits_again() -> None:
    made, x = layers(24, 12, (28, 28)), images(7, 24, (28, 28))
    assert all(map(torch.equal, step(made, x), step(made, x)))


def changed(made: nn.Sequential, change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    change(made)
    return made


#: What the operator leaves to the modules.
REFUSED: dict[str, Callable[[], nn.Sequential]] = {
    "evaluation": lambda: layers(6, 4).eval(),
    "cumulative average": lambda: changed(layers(6, 4), lambda made: setattr(made[0], "momentum", None)),
    "no parameters": lambda: nn.Sequential(nn.BatchNorm2d(6, affine=False), *list(layers(6, 4))[1:]),
    "no averages": lambda: nn.Sequential(nn.BatchNorm2d(6, track_running_stats=False), *list(layers(6, 4))[1:]),
    "another function": lambda: nn.Sequential(layers(6, 4)[0], nn.ReLU6(), layers(6, 4)[2]),
    "dense": lambda: layers(6, 4, engine="dense"),
    "auto": lambda: layers(6, 4, engine="auto"),
    "soft": lambda: layers(6, 4, clip=False),
    "bias": lambda: layers(6, 4, bias=True),
    "stride": lambda: layers(6, 4, stride=2),
    "dilation": lambda: layers(6, 4, dilation=2, padding=2),
    "groups": lambda: layers(6, 4, groups=2),
    "no padding": lambda: layers(6, 4, padding=0),
    "other padding": lambda: layers(6, 4, padding_mode="circular"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_know_is_the_modules(name: str, calls: list[str]) -> None:
    made, x = REFUSED[name](), images(3, 6)
    # Parameters that a module lacks are none of its gradients.
    for one, other in zip(step(made, x), step(made, x, plain), strict=True):
        assert torch.equal(one, other)
    assert not calls


@pytest.mark.parametrize(
    "x",
    [
        images(3, 6).contiguous(memory_format=torch.channels_last),
        images(3, 6).float(),
        images(3, 6).half(),
    ],
    ids=["channels last", "float32", "float16"],
)
def test_other_maps_are_the_modules(x: Tensor, calls: list[str]) -> None:
    made = layers(6, 4)
    for one, other in zip(step(made, x), step(made, x, plain), strict=True):
        assert torch.equal(one, other)
    assert not calls


def test_one_number_a_channel_is_torchs_error() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        step(layers(6, 4), images(1, 6, (1, 1)))


@pytest.mark.parametrize("position", [0, 1, 2, None])
def test_hooks_see_every_module(position: int | None, calls: list[str]) -> None:
    made, seen = layers(6, 4), []
    module = made if position is None else made[position]
    module.register_forward_hook(lambda *_: seen.append(position))
    with torch.autocast("cpu", torch.bfloat16):
        normed_sequential(made, images(3, 6))
    assert seen == [position]
    assert not calls


def test_without_kernels_torch_computes(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.setattr(kernels_of_it, "available", lambda **_: False)
    made, x = layers(6, 4), images(3, 6)
    assert all(map(torch.equal, step(made, x), step(made, x, plain)))
    assert not calls
    with pytest.raises(EngineUnavailable, match="no products of bfloat16"):
        torch.ops.tkn.normed_conv(*arguments(made, x))


def test_a_checkpointed_region_is_the_modules(calls: list[str]) -> None:
    made, x = layers(6, 4), images(3, 6)

    def forward(made: nn.Sequential, x: Tensor) -> Tensor:
        return checkpoint(normed_sequential, made, x, use_reentrant=False)

    ours, theirs = step(made, x, forward)[:7], step(made, x, plain)[:7]
    assert all(map(torch.equal, ours, theirs))
    assert not calls


def test_counted_transformed_and_traced_as_modules(calls: list[str]) -> None:
    made, x = layers(6, 4), images(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        with FlopCounterMode(display=False) as counter:
            normed_sequential(made, x)
        assert counter.get_total_flops() > 0
        with forward_ad.dual_level():
            normed_sequential(made, x)
    network = build_model("tdn10", (1, 8, 8), 3, engine="roi").train()
    names = {node.target for node in fx.Tracer(autowrap_modules=()).trace(network).nodes if node.op == "call_module"}
    assert "block1.0.layers.norm1" in names
    assert not calls


def arguments(made: nn.Sequential, x: Tensor) -> tuple[Any, ...]:
    norm, _, conv = made
    parameters = norm.weight, norm.bias, conv.weight, conv.loc, conv.scale
    return x, *parameters, norm.eps, conv.attention, conv.scale_unit


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck() -> None:
    made, x = layers(6, 4), images(3, 6).requires_grad_()
    if there():
        torch.library.opcheck(torch.ops.tkn.normed_conv.default, arguments(made, x))
    else:
        with pytest.raises(EngineUnavailable):
            torch.ops.tkn.normed_conv(*arguments(made, x))


def test_gradients_of_gradients() -> None:
    """The same as torch's of the modules, whose products are rounded alike."""
    made, x = layers(6, 4), images(3, 6)
    made[2].engine = "dense"
    expected = second(made, x, plain)
    made[2].engine = "roi"
    found = second(made, x, normed_sequential)
    for one, other in zip(found, expected, strict=True):
        assert error(one, other.double()) < 0.02


def second(made: nn.Sequential, x: Tensor, forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = forward(made, x)
    first = torch.autograd.grad(y.float().square().sum(), [x, *made.parameters()], create_graph=True)
    total = sum((grad.float().square().sum() for grad in first[1:]), torch.zeros(()))
    return torch.autograd.grad(total, [x, *made.parameters()])


def test_the_reference_is_the_modules() -> None:
    made, x = layers(6, 4).double(), images(3, 6).double()
    norm, _, conv = made
    y = reference(x, norm.weight, norm.bias, norm.eps, conv.target())
    torch.testing.assert_close(y, conv.dense(torch.relu(norm(x))))


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("model", ["tdn10", "tdn40"])
def test_a_compiled_densenet_takes_the_same_step(model: str, calls: list[str]) -> None:
    """In one graph; the same bits as uncompiled, the averages too."""
    torch.manual_seed(0)
    network = build_model(model, (1, 12, 12), 3, engine="roi", dropout=0.0).train()
    keys = list(network.state_dict())

    def forward(network: nn.Module, x: Tensor) -> Tensor:
        return network(x)

    def compiled(network: nn.Module, x: Tensor) -> Tensor:
        return torch.compile(network, backend="aot_eager", fullgraph=True)(x)

    x = torch.rand(4, 1, 12, 12)
    one = step(network, x, forward)
    made = list(calls)
    assert bool(made) == there()
    calls.clear()
    other = step(network, x, compiled)
    assert calls == made
    assert list(network.state_dict()) == keys
    if there():  # the modules' products are rounded otherwise in a compiled program
        assert all(map(torch.equal, other, one))
