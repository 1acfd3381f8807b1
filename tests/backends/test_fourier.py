"""Convolutions in the frequency domain: the same as tap by tap, forward and backward, where they are used."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from engine_cases import assert_near, targeted
from reference import convolution
from torch import Tensor, nn
from torch.nn import functional as F

import tkn
from tkn import TargetConv2d, build_model, targetize
from tkn.backends.torch import fourier
from tkn.backends.torch.fourier import fourier_conv2d, suited, use_fourier, uses_fourier
from tkn.cli import compose


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_gradients(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, inputs, random(*y.shape, seed=9).to(y.dtype))]


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (2, 4), (7, 1)])
@pytest.mark.parametrize("size", [(7, 7), (8, 5), (12, 11)])
@pytest.mark.parametrize("padded", ["not", "same", "most"])
def test_equals_the_reference(kernel: tuple[int, int], size: tuple[int, int], padded: str) -> None:
    padding = {"not": (0, 0), "same": (kernel[0] // 2, kernel[1] // 2), "most": (kernel[0] - 1, kernel[1] - 1)}[padded]
    x, weight, bias = random(3, 4, *size).requires_grad_(), random(5, 4, *kernel, seed=1), random(5, seed=2)
    weight.requires_grad_()
    bias.requires_grad_()
    around = tuple((p, p) for p in padding)
    expected = convolution(x, weight, bias, (1, 1), around, (1, 1), 1)
    ours = fourier_conv2d(x, weight, bias, padding)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    for mine, theirs in zip(
        with_gradients(ours, x, weight, bias), with_gradients(expected, x, weight, bias), strict=True
    ):
        assert_near(mine, theirs, 1e-12)


def layer(
    targeted_: bool = False, inputs: int = 128, outputs: int = 128, kernel: int = 5, **options: object
) -> nn.Conv2d:
    torch.manual_seed(0)
    kind = TargetConv2d if targeted_ else nn.Conv2d
    if targeted_:
        options["engine"] = "dense"
    return kind(inputs, outputs, kernel, **{"padding": kernel // 2, **options})


@pytest.mark.parametrize("of_target", [False, True])
def test_a_layer_stays_what_it_is(of_target: bool) -> None:
    plain = layer(of_target)
    if of_target:
        targeted(plain, engine="dense")
    ours = copy.deepcopy(plain)
    use_fourier(ours)
    assert uses_fourier(copy.deepcopy(ours))
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = random(64, 128, 9, 8, dtype=torch.float32)
    with torch.inference_mode():
        ours(x)  # what is kept for later calls must serve gradients too
    truth = copy.deepcopy(plain).double()
    results = [
        with_gradients(network(x.to(network.weight.dtype)), *network.parameters()) for network in (ours, plain, truth)
    ]
    assert not torch.equal(results[0][0], results[1][0])
    for mine, _, exact in zip(*results, strict=True):
        assert_near(mine, exact, 2e-6)


def test_under_autocast_it_rounds_twice_as_much_as_torch() -> None:
    x, conv = random(64, 128, 8, 8, dtype=torch.float32).relu(), layer(bias=True)
    exact = with_gradients(conv(x), *conv.parameters())
    errors = []
    for used in (False, True):
        if used:
            use_fourier(conv)
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
        assert y.dtype == torch.bfloat16
        errors.append(
            [
                (a.float() - b).norm() / b.norm()
                for a, b in zip(with_gradients(y, *conv.parameters()), exact, strict=True)
            ]
        )
    for by_torch, ours in zip(*errors, strict=True):
        assert ours < max(3 * by_torch, 0.01)


def test_autocast_leaves_float64_and_gradients_as_they_are() -> None:
    x, conv = random(64, 128, 8, 8), layer().double()
    use_fourier(conv)
    exact = with_gradients(conv(x), *conv.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        inside = with_gradients(conv(x), *conv.parameters())
    for mine, theirs in zip(inside, exact, strict=True):
        assert torch.equal(mine, theirs)
    conv, x = conv.float(), x.float()
    exact = with_gradients(conv(x), *conv.parameters())
    y = conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = with_gradients(y, *conv.parameters())
    for mine, theirs in zip(inside, exact, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("kernel", "batch", "side", "expected"),
    [
        *((5, 128, 14, True), (5, 128, 28, True), (5, 64, 16, True), (3, 128, 8, True), (3, 128, 12, True)),
        *((5, 1, 14, False), (3, 16, 12, False), (3, 16, 28, False), (3, 4, 56, False), (3, 1, 112, False)),
    ],
)
def test_where_it_pays(monkeypatch: pytest.MonkeyPatch, kernel: int, batch: int, side: int, expected: bool) -> None:
    """As it was measured: forward and backward, float32, one thread."""
    conv = layer(kernel=kernel)
    use_fourier(conv)
    calls = []
    monkeypatch.setattr(fourier, "fourier_conv2d", lambda x, *_: (calls.append(1), x)[1])
    monkeypatch.setattr(F, "conv2d", lambda x, *_args, **_options: x)
    conv(torch.empty(batch, 128, side, side))
    assert bool(calls) is expected


@pytest.mark.parametrize(
    "options",
    [
        {"inputs": 127},
        {"outputs": 127},
        {"kernel": 1},
        {"stride": 2},
        {"dilation": 2},
        {"groups": 2},
        {"padding_mode": "reflect"},
        {"padding": "same"},
        {"padding": 5},
    ],
    ids=str,
)
def test_what_stays_with_torch(options: dict[str, object]) -> None:
    assert not suited(nn.Sequential(layer(**options)))
    assert list(suited(nn.Sequential(layer()))) == ["0"]


def test_a_convolution_with_a_forward_of_its_own_stays_as_it_is() -> None:
    class Scaled(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, 2 * weight, bias)

    assert not suited(Scaled(128, 128, 5))


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("cnn6", ["3", "6"]),
        ("tkn6", ["3", "6"]),
        ("stn", ["5", "9"]),
        ("tstn", ["5", "9"]),
        ("dn10", []),
        ("tdn40", []),
    ],
)
def test_the_papers_networks(model: str, layers: list[str]) -> None:
    assert list(suited(build_model(model, (3, 16, 16), 4))) == layers


def test_what_torch_follows_or_refuses_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = layer()
    x = random(64, 128, 6, 6, dtype=torch.float32)
    expected = conv(x)
    use_fourier(conv)
    with torch.no_grad():
        assert not torch.equal(conv(x), expected)
        monkeypatch.setattr(fourier, "fourier_conv2d", None)
        assert torch.equal(torch.compile(conv, backend="eager", fullgraph=True)(x), expected)
        assert_near(conv(x[0]), expected[0])
        assert conv(x[:0]).shape == (0, 128, 6, 6)
        with pytest.raises(RuntimeError, match=r"expected input.* to have 128 channels"):
            conv(x[:, 1:])
        unpadded = layer(padding=0)
        use_fourier(unpadded)
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            unpadded(x[..., :4])


def test_plans_and_counts_do_not_see_it() -> None:
    model = nn.Sequential(layer(), nn.ReLU()).eval()
    targets = targetize(model)
    x = random(2, 128, 6, 6, dtype=torch.float32)
    macs = tkn.count_macs(targets, (128, 6, 6)).total_dense
    expected = tkn.accelerate(targets, batch_size=2, input_size=(128, 6, 6))(x)
    use_fourier(targets)
    assert tkn.count_macs(targets, (128, 6, 6)).total_dense == macs
    torch.testing.assert_close(tkn.accelerate(targets, batch_size=2, input_size=(128, 6, 6))(x), expected)


@pytest.mark.parametrize("used", ["true", "false"])
def test_a_run_uses_it_if_it_is_asked_to(tmp_path: Path, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compute = fourier_conv2d
    monkeypatch.setattr(fourier, "fourier_conv2d", lambda *args: (calls.append(args), compute(*args))[1])
    summary, objects = tkn.run(
        compose(
            *("model=cnn6", "data=mnist", "data.source=embedded", "data.limit=64", "recipe.batch_size=64"),
            *("trainer.max_epochs=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"),
            *("trainer.accelerator=cpu", f"trainer.fourier={used}", "recipe.ema_decay=0.9"),
        ),
        tmp_path,
    )
    assert summary["fourier"] is (used == "true")
    assert bool(calls) is (used == "true")
    for network in (objects["module"].model, objects["module"].raw):
        used_by = [name for name, module in network.named_modules() if uses_fourier(module)]
        assert used_by == (["3", "6"] if used == "true" else [])
