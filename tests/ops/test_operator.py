"""The target layer as torch's tools see it: one operation, the dense reference's results."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from as_function import as_function
from engine_cases import assert_near, difference, engine_of, place_rois, python, results, targeted, truth, with_engine
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tkn import TargetConv1d, TargetConv2d, TargetConv3d, count_macs, targetize
from tkn.backends.cpu import backend
from tkn.backends.cpu.chain import Chain
from tkn.geometry import Pool
from tkn.kept import Kept
from tkn.ops import segments, sticky
from tkn.sequential import TargetSequential
from tkn.spec import decode, encode

ENGINES = ("auto", "roi", "dense")


def layer(engine: str = "roi", **options: Any) -> TargetConv2d:
    torch.manual_seed(0)
    return targeted(TargetConv2d(3, 18, 3, **{"padding": 1, **options}), seed=1, engine=engine)


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
    return targeted(network, seed=1, engine=engine)


def images(batch: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 8, 9, generator=torch.Generator().manual_seed(0), dtype=dtype)


class Small(nn.Module):
    """A network as torchvision's are: blocks with sums, normalisation, in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.norm(self.two(self.relu(self.one(x)))) + x)
        return self.head(x.mean(dim=(2, 3)))


def small(engine: str = "roi") -> nn.Module:
    torch.manual_seed(0)
    return targeted(targetize(Small(), engine=engine), seed=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernels are called for."""
    made: list[str] = []
    for name in ("forward", "backward"):
        method = getattr(Chain, name)
        monkeypatch.setattr(
            Chain, name, lambda self, *args, name=name, method=method: (made.append(name), method(self, *args))[1]
        )
    return made


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(made: nn.Module, x: Tensor, engine: str) -> tuple[Any, ...]:
    return (x, made.weight, made.bias, made.loc, made.scale, *made.target().spec.arguments(), engine)


#: opcheck looks at gradients of tensors that have none.
OF_TORCHS_OWN = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

LAYERS = {
    "2d": (lambda: TargetConv2d(3, 4, 3, padding=1), (2, 3, 6, 7)),
    "2d, one image": (lambda: TargetConv2d(3, 4, 3, padding=1), (3, 6, 7)),
    "2d, odd padding": (lambda: TargetConv2d(3, 4, (2, 4), padding="same", attention="gaussian"), (2, 3, 6, 7)),
    "2d, soft, groups": (lambda: TargetConv2d(4, 4, 3, 2, 1, 1, 2, bias=False, clip=False), (2, 4, 6, 7)),
    "1d": (lambda: TargetConv1d(3, 4, 3, padding=1), (2, 3, 9)),
    "3d": (lambda: TargetConv3d(2, 3, 2), (2, 2, 4, 5, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@OF_TORCHS_OWN
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LAYERS)
def test_opcheck_of_a_layer(name: str, engine: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    made = make()
    with torch.no_grad():
        made.loc.uniform_(0.3, 0.7)
        made.scale.uniform_(0.4, 0.8)
    torch.library.opcheck(
        torch.ops.tkn.target_conv.default, arguments(made, torch.rand(shape, requires_grad=True), engine)
    )


#: Networks of one and three dimensions, and the shape of their images.
OTHER_DIMENSIONS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "1d": (
        lambda: TargetSequential(TargetConv1d(3, 6, 3), nn.ReLU(), nn.MaxPool1d(2), TargetConv1d(6, 4, 3, padding=1)),
        (3, 13),
    ),
    "3d": (
        lambda: TargetSequential(TargetConv3d(3, 6, 2), nn.ReLU(), nn.AvgPool3d(2), TargetConv3d(6, 4, 3, padding=1)),
        (3, 5, 6, 5),
    ),
}


def of_other_dimensions(name: str, engine: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = OTHER_DIMENSIONS[name]
    return targeted(make(), seed=1, engine=engine), torch.randn(5, *shape)


@OF_TORCHS_OWN
@pytest.mark.parametrize("name", OTHER_DIMENSIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_opcheck_of_a_sequence_of_other_dimensions(engine: str, name: str) -> None:
    network, x = of_other_dimensions(name, engine)
    pool = Pool((2,)) if name == "1d" else Pool((2, 2, 2), average=True)
    targets = [network[0].target(relu=True, pool=pool), network[3].target()]
    tensors = [tensor for target in targets for tensor in target.tensors]
    torch.library.opcheck(
        torch.ops.tkn.target_sequence.default, (x.requires_grad_(), tensors, *encode(targets), engine)
    )


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", OTHER_DIMENSIONS)
def test_compiled_and_exported_in_other_dimensions(name: str, engine: str, calls: list[str]) -> None:
    network, x = of_other_dimensions(name, engine)
    expected = results(truth(network), x.double())
    calls.clear()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for one, other in zip(results(compiled, x), expected, strict=True):
        assert_near(one, other)
    if engine == "roi":
        assert set(calls) == {"forward", "backward"}
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network.eval(), (x,), dynamic_shapes=({0: batch},))
    calls.clear()
    with torch.no_grad():
        assert_near(program.module()(x[:3]), expected[0][:3])
    if engine == "roi":
        assert calls == ["forward"]


@OF_TORCHS_OWN
@pytest.mark.parametrize("engine", ENGINES)
def test_opcheck_of_a_sequence(engine: str) -> None:
    network = chain()
    targets = [network[0].target(relu=True, pool=None), network[3].target()]
    tensors = [tensor for target in targets for tensor in target.tensors]
    x = images().requires_grad_()
    torch.library.opcheck(torch.ops.tkn.target_sequence.default, (x, tensors, *encode(targets), engine))


def test_specs_travel_as_plain_arguments() -> None:
    network = chain()
    targets = [network[0].target(relu=True), layer(groups=3, padding=(2, 1), bias=False).target()]
    tensors = [tensor for target in targets for tensor in target.tensors]
    again = decode(tensors, *encode(targets))
    assert [target.spec for target in again] == [target.spec for target in targets]
    assert [target.bias is None for target in again] == [False, True]
    with pytest.raises(ValueError, match="are no target layers"):
        decode(tensors, "cauchy 1,1", [0.5])
    with pytest.raises(ValueError, match="2 target layers need 7 tensors, not 6"):
        decode(tensors[:-1], *encode(targets))


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [layer, chain, small])
def test_compiled(make: Callable[..., nn.Module], engine: str, calls: list[str]) -> None:
    """Forward and backward in one graph, inside the ROIs."""
    network, x = make(engine), images()
    expected = results(truth(make(engine)), x.double())
    calls.clear()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for one, other in zip(results(compiled, x), expected, strict=True):
        assert_near(one, other)
    if engine == "roi":
        assert set(calls) == {"forward", "backward"}
    if engine == "dense":
        assert not calls


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("make", [layer, chain])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_compiled_under_autocast(make: Callable[..., nn.Module], kind: torch.dtype) -> None:
    network, x = make(), images()
    expected = results(truth(network), x.double())
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", kind):
        assert compiled(x).dtype == kind
        ours = results(compiled, x)
    with torch.autocast("cpu", kind):
        theirs = results(with_engine(network, "dense"), x)
    for one, other, right in zip(ours, theirs, expected, strict=True):
        assert one.dtype == other.dtype
        assert difference(one, right) <= 2 * difference(other, right) + 1e-3


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_once_for_all_batches_and_rois(calls: list[str]) -> None:
    network = chain()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    for seed, batch in enumerate((3, 40, 7)):
        targeted(network, seed=seed + 5)
        assert_near(compiled(images(batch)), truth(network)(images(batch).double()))
    assert calls == ["forward"] * 3


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("make", [layer, chain])
def test_compiled_follows_a_scale_unit(make: Callable[..., nn.Module]) -> None:
    """Which the compiler may know as a variable."""
    network, x = make(), images()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    for unit in (0.5, 0.3):
        for module in network.modules():
            if isinstance(module, TargetConv2d):
                module.scale_unit = unit
        for one, other in zip(results(compiled, x), results(truth(network), x.double()), strict=True):
            assert_near(one, other)


@pytest.mark.parametrize("make", [layer, chain, small])
def test_exported_with_a_dynamic_batch(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    """Saved, loaded and run in a fresh process."""
    network, x = make().eval(), images()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
    assert any(str(node.target).startswith("tkn.target_") for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "network.pt2")
    torch.save((images(7), network(images(7))), tmp_path / "expected.pt")
    code = f"""
import json, torch, tkn
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
program = torch.export.load({str(tmp_path / "network.pt2")!r}).module()
with torch.no_grad():
    print(json.dumps(float((program(x) - expected).abs().max())))
"""
    assert python(code) < 1e-5


def test_features_of_a_targeted_resnet() -> None:
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    model = targeted(targetize(resnet18()), seed=1).eval()
    extractor = create_feature_extractor(model, ["layer2", "fc"])
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = extractor(x)
        assert found["layer2"].shape == (2, 128, 4, 4)
        assert torch.equal(found["fc"], model(x))


def test_layers_of_a_sequence_are_features_too() -> None:
    network, x = chain().eval(), images()
    traced = torch.fx.symbolic_trace(network)
    names = [node.target for node in traced.graph.nodes]
    assert torch.ops.tkn.target_conv in names
    assert_near(traced(x), truth(network)(x.double()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [layer, chain])
def test_fake_and_meta_tensors(make: Callable[..., nn.Module], engine: str) -> None:
    x = images()
    expected = make("dense")(x)
    with FakeTensorMode():
        faked = make(engine)(torch.empty(5, 3, 8, 9))
    assert faked.shape == expected.shape
    assert faked.stride() == expected.stride()
    assert make("auto").to("meta")(x.to("meta")).shape == expected.shape


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("make", [layer, chain])
def test_a_default_device_is_not_that_of_the_layer(make: Callable[..., nn.Module], device: str) -> None:
    network, x = make(), images()
    expected = results(truth(network), x.double())
    up = torch.ones_like(network(x))
    with torch.device(device):
        y = network(x)
        grads = torch.autograd.grad(y, list(network.parameters()), up)
    assert y.device.type == "cpu"
    assert_near(y, expected[0])
    assert all(grad.device.type == "cpu" for grad in grads)
    more, expected_of_more = images(17), truth(network)(images(17).double())
    with torch.device(device), torch.no_grad():
        y = network(more)
    assert_near(y, expected_of_more)


@pytest.mark.parametrize("make", [layer, chain])
def test_negative_bits(make: Callable[..., nn.Module]) -> None:
    """Views that owe a sign, as input and as gradient."""
    network = make()
    x = torch.complex(torch.zeros_like(images()), images()).conj().imag
    assert x.is_neg()
    assert_near(network(x), truth(network)(x.resolve_neg().double()))
    y = network(images())
    z = torch.complex(torch.zeros_like(y), y)
    w = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.complex64)
    ours = torch.autograd.grad((z.conj() * w).real.sum(), list(network.parameters()))
    theirs = truth(network)
    z = torch.complex(torch.zeros_like(y).double(), theirs(images().double()))
    for one, other in zip(ours, torch.autograd.grad((z.conj() * w).real.sum(), list(theirs.parameters())), strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [layer, chain, small])
def test_gradients_of_gradients(make: Callable[..., nn.Module], engine: str) -> None:
    """A penalty on the input's gradient, whose own gradient is one throughout."""
    network, theirs = make(engine), truth(make(engine))

    def penalised(model: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = model(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert gradient.requires_grad
        loss = y.mean() + 10 * gradient.square().sum()
        return list(torch.autograd.grad(loss, [x, *model.parameters()]))

    for one, other in zip(penalised(network, images()), penalised(theirs, images().double()), strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("make", [layer, chain])
def test_gradgradcheck(make: Callable[..., nn.Module]) -> None:
    network = make().double()
    x = images(2, torch.float64).requires_grad_()

    assert torch.autograd.gradgradcheck(as_function(network), (x, *network.parameters()), fast_mode=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(engine: str, reentrant: bool) -> None:
    network, x = chain(engine), images()
    expected = results(truth(network), x.double())
    x.requires_grad_()
    y = checkpoint(network, x, use_reentrant=reentrant)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    y.backward(up)
    for one, other in zip((y, x.grad, *(p.grad for p in network.parameters())), expected, strict=True):
        assert_near(one, other)


def test_a_choice_stays_between_a_pass_and_its_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sticky, "_choices", Kept(16))
    network = chain("auto")
    answers = iter([False, False, True, True, True, True])
    monkeypatch.setattr(segments, "is_faster", lambda *_: next(answers))
    x = images().requires_grad_()
    checkpoint(network, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
    assert engine_of(network(images())) == "roi"


@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_see_their_own_gradients(engine: str) -> None:
    """Nothing runs behind the user's back: a hook on a parameter fires once for each backward pass."""
    torch.manual_seed(0)
    big = targeted(TargetConv2d(32, 32, 5, padding=2, engine=engine), seed=1)
    seen: list[float] = []
    big.weight.register_hook(lambda grad: seen.append(float(grad.abs().sum())))
    y = big(torch.rand(4, 32, 16, 16))
    assert not seen
    y.sum().backward()
    assert len(seen) == 1
    assert seen[0] == pytest.approx(float(big.weight.grad.abs().sum()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning", "ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("make", [layer, chain])
def test_function_transforms(make: Callable[..., nn.Module]) -> None:
    network, x = make(), images()
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    network.zero_grad()
    network(x).square().sum().backward()
    for name, gradient in torch.func.grad(loss)(parameters, x).items():
        assert_near(gradient, network.get_parameter(name).grad)
    per_image = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    for name, gradient in per_image.items():
        assert_near(gradient.sum(0), network.get_parameter(name).grad)
    assert_near(torch.vmap(lambda one: network(one[None])[0])(x), network(x))
    _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))
    assert_near(tangent, torch.func.grad(lambda x: loss(parameters, x))(x).sum())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [layer, chain])
def test_flops_are_those_inside_the_rois(make: Callable[..., nn.Module], engine: str) -> None:
    network, x = make(engine), images()
    macs = count_macs(network, (3, 8, 9)).total_roi
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    assert counter.get_total_flops() == 2 * 5 * macs
    with FlopCounterMode(display=False) as counter:
        y = network(x.requires_grad_())
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * macs
    assert_near(y, truth(network)(x.double()))


@OF_TORCHS_OWN
def test_rois_of_each_image() -> None:
    """loc and scale with a batch axis: as each image by itself, with gradients."""
    made = layer("auto").double()
    x = images(3, torch.float64)
    generator = torch.Generator().manual_seed(3)
    loc = (0.3 + 0.4 * torch.rand(3, 2, 18, generator=generator, dtype=torch.float64)).requires_grad_()
    scale = (0.3 + 0.4 * torch.rand(3, 2, 18, generator=generator, dtype=torch.float64)).requires_grad_()
    args = arguments(made, x, "auto")
    together = torch.ops.tkn.target_conv(*args[:3], loc, scale, *args[5:])
    alone = [torch.ops.tkn.target_conv(x[i : i + 1], *args[1:3], loc[i], scale[i], *args[5:]) for i in range(3)]
    assert_near(together, torch.cat(alone), 1e-12)
    up = torch.randn(together.shape, generator=generator, dtype=torch.float64)
    wanted = [loc, scale, made.weight]
    theirs = torch.autograd.grad(torch.cat(alone), wanted, up)
    for one, other in zip(torch.autograd.grad(together, wanted, up), theirs, strict=True):
        assert_near(one, other, 1e-12)
    inside_roi = (x, *args[1:3], loc, scale, *args[5:-1], "roi")
    with pytest.raises(ValueError, match="knows no ROIs of each image"):
        torch.ops.tkn.target_conv(*inside_roi)
    torch.library.opcheck(torch.ops.tkn.target_conv.default, (x, *args[1:3], loc, scale, *args[5:]))


def test_threads_on_one_layer() -> None:
    """Eight threads, batches of changing sizes, a thousand calls: the results of one."""
    network = chain()
    batches = [images(batch) for batch in (1, 2, 3, 5, 17, 40)]
    with torch.no_grad():
        expected = [network(x) for x in batches]
    wrong: list[str] = []

    def work(first: int) -> None:
        try:
            with torch.no_grad():
                for call in range(125):
                    which = (first + call) % len(batches)
                    if not torch.equal(network(batches[which]), expected[which]):
                        wrong.append(f"batch {len(batches[which])}")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_and_the_operator_itself() -> None:
    network, x = chain(), images()
    with torch.inference_mode():
        assert_near(network(x), truth(network)(x.double()))
        assert_near(torch.ops.tkn.target_conv(*arguments(network[0], x, "roi")), network[0](x), 1e-6)


BAD: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "engine": (lambda: arguments(layer(), images(), "rio"), "unknown engine 'rio'; did you mean 'roi'"),
    "attention": (
        lambda: (*arguments(layer(), images(), "auto")[:5], "gausian", *arguments(layer(), images(), "auto")[6:]),
        "unknown attention 'gausian'; did you mean 'gaussian'",
    ),
    "devices": (
        lambda: (images(), *arguments(layer().to("meta"), images(), "auto")[1:]),
        "weight is on meta, the input on cpu",
    ),
    "loc's shape": (
        lambda: (
            *arguments(layer(), images(), "auto")[:3],
            torch.ones(2, 3),
            *arguments(layer(), images(), "auto")[4:],
        ),
        r"loc of shape \[2, 3\] must be \[2, 18\]",
    ),
    "padding": (
        lambda: (*arguments(layer(), images(), "auto")[:9], [1, 1], *arguments(layer(), images(), "auto")[10:]),
        "must have one, two",
    ),
    "types": (lambda: arguments(layer().double(), images(), "roi"), "parameters of the input's type, torch.float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        torch.ops.tkn.target_conv(*make())


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_that_are_no_numbers(engine: str) -> None:
    """A NaN in loc or scale is an empty ROI, under every engine."""
    broken = layer(engine)
    with torch.no_grad():
        broken.loc[0, 3] = torch.nan
        broken.scale[1, 5] = torch.nan
        broken.scale[0, 7] = -1
    y = broken(images())
    assert y[:, [0, 1, 2]].isfinite().all()
    assert engine != "roi" or y[:, [3, 5, 7]].eq(0).all()


def test_maps_smaller_than_the_kernel() -> None:
    for engine in ENGINES:
        with pytest.raises((ValueError, RuntimeError), match=r"does not fit|Kernel size can't be greater"):
            layer(engine, padding=0)(torch.rand(2, 3, 2, 2))


def test_distributed_data_parallel(tmp_path: Path) -> None:
    network, x = chain(), images()
    expected = results(network, x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(network)
        for one, other in zip(results(parallel, x), expected, strict=True):
            assert_near(one, other, 1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_lists_are_kept_up_to_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(200_000)
    monkeypatch.setattr(backend, "_stages", kept)
    network = layer()
    for batch in range(1, 12):
        network(images(batch))
        assert kept.nbytes <= kept.limit or len(kept._values) == 1
    assert 1 <= len(kept._values) < 11
    stays = layer(bias=False)
    for batch in range(1, 12):  # what is used stays
        stays(images(3))
        made = kept._values.copy()
        network(images(batch))
        assert any(key in kept._values for key in made)


def test_copies_of_layers_in_several_processes(tmp_path: Path) -> None:
    network = chain()
    torch.save(network, tmp_path / "network.pt")
    again = torch.load(tmp_path / "network.pt", weights_only=False)
    assert torch.equal(again(images()), network(images()))
    assert torch.equal(copy.deepcopy(network)(images()), network(images()))


class Watching(TorchDispatchMode):
    """Sees every operation and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rois", ["random", "pixel", "full", "edge", "border"])
def test_watched_layers_have_the_gradients_of_eager_ones(rois: str) -> None:
    """The formulas of the pair of operators against the reference, in every state of the ROIs."""
    network = chain("roi").double()
    place_rois(network[0], rois, (8, 9), 3)
    x = images(3, torch.float64)
    expected = results(truth(network), x)
    for engine in ENGINES:
        with Watching():
            for one, other in zip(results(with_engine(network, engine), x), expected, strict=True):
                assert_near(one, other, 1e-11)
