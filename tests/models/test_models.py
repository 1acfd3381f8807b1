"""The paper's networks: parameters, multiply-adds, target layers, initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tkn import TargetConv2d, build_model, count_macs
from tkn.layers import roi_layers
from tkn.models import MODEL_NAMES
from tkn.models.stn import SpatialTransformer

PAIRS = [("cnn6", "tkn6"), ("dn10", "tdn10"), ("dn40", "tdn40"), ("stn", "tstn")]
#: the smallest image each network takes, and the odd, non-square ones tried
LEAST = {"cnn6": 4, "tkn6": 4, "dn10": 4, "tdn10": 4, "dn40": 4, "tdn40": 4, "stn": 16, "tstn": 16}
#: (kernel size, block, kernels) of every target layer: Table 1's convolutions in bold
TARGETED = {
    "tkn6": [(5, 0, 256), (5, 1, 256), (5, 2, 128)],
    "tdn10": [(3, block, 12) for block in (0, 0, 1, 1, 2, 2)],
    "tdn40": [(3, block, 36) for block in (0, 1, 2) for _ in range(6)],
    "tstn": [(7, 0, 128), (5, 1, 128), (3, 2, 256)],
}


def smallest(name: str, channels: int = 1, outputs: int = 3) -> nn.Module:
    """The network at its smallest image size, from seed 0."""
    torch.manual_seed(0)
    return build_model(name, (channels, LEAST[name], LEAST[name]), outputs)


@pytest.mark.parametrize(
    ("name", "input_size", "outputs", "parameters", "macs"),
    [
        ("cnn6", (1, 28, 28), 10, 4_586_642, 368_407_442),
        ("tkn6", (1, 28, 28), 10, 4_586_642 + 2_560, 368_407_442),
        ("cnn6", (1, 56, 56), 10, 10_758_290, 1_473_433_490),
        ("tkn6", (1, 56, 56), 10, 10_758_290 + 2_560, 1_473_433_490),
        ("dn10", (1, 28, 28), 10, 44_746, 11_317_030),
        ("tdn10", (1, 28, 28), 10, 45_034, 11_317_030),
        ("dn10", (1, 56, 56), 10, 44_746, 45_265_210),
        ("tdn10", (1, 56, 56), 10, 45_034, 45_265_210),
        ("dn40", (3, 32, 32), 10, 832_474, 356_626_306),
        ("tdn40", (3, 32, 32), 10, 835_066, 356_626_306),
        ("dn40", (3, 48, 48), 1, 828_901, 802_400_653),
        ("tdn40", (3, 48, 48), 1, 831_493, 802_400_653),
        ("stn", (3, 32, 32), 43, 1_197_761, 145_342_481),
        ("tstn", (3, 32, 32), 43, 1_199_809, 145_342_481),
    ],
)
def test_the_papers_counts(
    name: str, input_size: tuple[int, int, int], outputs: int, parameters: int, macs: int
) -> None:
    """Exact; targeted networks start with every ROI the whole map."""
    report = count_macs(build_model(name, input_size, outputs), input_size)
    assert report.parameters == parameters
    assert report.total_dense == report.total_roi == macs
    assert report.unknown == ()


def test_input_size_needs_channels() -> None:
    with pytest.raises(ValueError, match=r"input_size=\(28, 28\) must be \(channels, height, width\)"):
        build_model("tkn6", (28, 28), 10)  # type: ignore[arg-type]


def test_names() -> None:
    assert list(MODEL_NAMES) == [name for pair in PAIRS for name in pair]


@pytest.mark.parametrize(("baseline", "targeted"), PAIRS)
def test_target_layers_are_the_papers(baseline: str, targeted: str) -> None:
    layers = roi_layers(smallest(targeted))
    described = [(layer.kernel_size, layer.block, layer.out_channels) for layer in layers.values()]
    assert described == [((k, k), block, kernels) for k, block, kernels in TARGETED[targeted]]
    assert all(type(layer) is TargetConv2d for layer in layers.values())
    assert roi_layers(smallest(baseline)) == {}


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_convolutions_keep_the_size_and_have_no_bias(name: str) -> None:
    model = smallest(name)
    sizes: list[tuple[torch.Size, torch.Size]] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            module.register_forward_hook(lambda _m, args, out: sizes.append((args[0].shape[2:], out.shape[2:])))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 1, LEAST[name], LEAST[name]))
    assert len(sizes) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert all(before == after for before, after in sizes)


@pytest.mark.parametrize("extra", [(0, 0), (3, 6)], ids=str)
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_odd_and_non_square_images(name: str, extra: tuple[int, int]) -> None:
    torch.manual_seed(0)
    size = (2, LEAST[name] + extra[0], LEAST[name] + extra[1])
    model = build_model(name, size, 5)
    output = model(torch.randn(2, *size))
    assert output.shape == (2, 5)
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_too_small_images(name: str) -> None:
    least = LEAST[name]
    for size in [(1, least - 1, least), (1, least, least - 1), (0, least, least)]:
        text = "x".join(map(str, size))
        with pytest.raises(ValueError, match=rf"model {name} .* at least {least}x{least} .* input_size={text} "):
            build_model(name, size, 2)


@pytest.mark.parametrize(("name", "nearest"), [("tkn", "tkn6"), ("tnd10", "tdn10"), ("DN40", "dn40"), ("tsnt", "tstn")])
def test_unknown_names(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown model '{name}'; (did you mean '{nearest}'\?|.*\b{nearest}\b)"):
        build_model(name, (1, 28, 28), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_outputs": 0}, "num_outputs=0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1\.0 must lie within \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0\.1 must lie within"),
        ({"attention": "cauch"}, "did you mean 'cauchy'"),
        ({"min_size": 0}, "min_size=0"),
        ({"scale_unit": 0.0}, r"scale_unit=0\.0"),
    ],
)
def test_impossible_options(options: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model("tdn10", (1, 8, 8), **{"num_outputs": 2, **options})


@pytest.mark.parametrize(
    ("name", "default", "count"), [("tkn6", 0.5, 1), ("dn10", 0.0, 8), ("tdn40", 0.2, 38), ("stn", 0.6, 1)]
)
def test_dropout(name: str, default: float, count: int) -> None:
    """After each convolution inside DenseNets' blocks and transitions; else before the last layer only."""

    def probabilities(model: nn.Module) -> list[float]:
        return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]

    assert probabilities(smallest(name)) == [default] * count
    size = (1, LEAST[name], LEAST[name])
    assert probabilities(build_model(name, size, 2, dropout=0.3)) == [0.3] * count
    assert probabilities(build_model(name, size, 2, dropout=0)) == [0] * count


def test_options_reach_the_target_layers() -> None:
    model = build_model("tstn", (1, 16, 16), 2, attention="gaussian", scale_unit=1.0, min_size="kernel", clip=False)
    layers = roi_layers(model).values()
    assert {(x.attention, x.scale_unit, x.clip) for x in layers} == {("gaussian", 1.0, False)}
    assert [layer.min_size for layer in layers] == [(7, 7), (5, 5), (3, 3)]


@pytest.mark.parametrize(("baseline", "targeted"), PAIRS)
def test_infinite_scales_give_the_baseline(baseline: str, targeted: str) -> None:
    """The same parameter names, so the baseline's weights load; the same seed gives them anyway."""
    plain, model = smallest(baseline).eval(), smallest(targeted).eval()
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, model.get_parameter(name))
    model.load_state_dict(plain.state_dict())
    x = torch.randn(3, 1, LEAST[baseline], LEAST[baseline])
    with torch.no_grad():
        assert not torch.equal(model(x), plain(x))
        for layer in roi_layers(model).values():
            nn.init.constant_(layer.scale, torch.inf)
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("size", [(3, 16, 16), (1, 17, 22)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_spatial_transformer_starts_at_the_identity(size: tuple[int, int, int], training: bool) -> None:
    torch.manual_seed(0)
    transformer = build_model("tstn", size, 4)[0].train(training)
    assert isinstance(transformer, SpatialTransformer)
    x = torch.rand(2, *size)
    torch.testing.assert_close(transformer(x), x, rtol=1e-4, atol=1e-5)


def test_spatial_transformer_moves_images() -> None:
    torch.manual_seed(0)
    transformer = build_model("stn", (1, 16, 16), 4)[0].eval()
    with torch.no_grad():
        transformer.affine.bias[2] = 2 / 16  # one pixel to the right in the grid's [-1, 1]
    x = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(transformer(x)[..., :-1], x[..., 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_he_initialisation(name: str) -> None:
    """Variance 2 / fan in, mean 0, biases 0, within five standard errors."""
    model = smallest(name, channels=3)
    checked = 0
    for layer_name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or layer_name.endswith("affine"):
            continue
        weight: Tensor = module.weight.detach().double()
        variance, count = 2 / weight[0].numel(), weight.numel()
        assert abs(weight.mean().item()) < 5 * (variance / count) ** 0.5
        assert weight.var(correction=0).item() == pytest.approx(variance, rel=5 * (2 / count) ** 0.5)
        assert module.bias is None or module.bias.eq(0).all()
        checked += 1
    assert checked >= 6
    for layer in roi_layers(model).values():
        assert layer.loc.eq(0.5).all()
        assert layer.scale.eq(1).all()


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_seed_gives_the_same_weights(name: str) -> None:
    first, again = smallest(name).state_dict(), smallest(name).state_dict()
    assert all(torch.equal(weight, again[key]) for key, weight in first.items())
    torch.manual_seed(1)
    other = build_model(name, (1, LEAST[name], LEAST[name]), 3)
    weights = [m.weight for m in other.modules() if isinstance(m, nn.Conv2d)]
    same = [m.weight for m in smallest(name).modules() if isinstance(m, nn.Conv2d)]
    assert not any(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_the_transformer_places_pixels_exactly_under_autocast() -> None:
    transformer = build_model("stn", (3, 30, 30), 5).eval()[0]
    x = torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        transformer.affine.bias[2] = 0.013
        expected = transformer(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(transformer(x), expected, rtol=0, atol=2e-3)
