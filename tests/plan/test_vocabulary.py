"""The functions that files may name: they do what the modules do, and nothing that a file must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import assert_near
from torch import Tensor, nn

from tkn import AttentiveRegularization2d
from tkn.plan import guard
from tkn.plan.modules import _MODULES, as_function
from tkn.plan.vocabulary import VOCABULARY, Attribute, Method, function_name, method_name

X = torch.randn(3, 8, 6, 4, generator=torch.Generator().manual_seed(0))
LINES = X.flatten(2)
#: Modules of all kinds, and what they are tried on.
MODULES: list[tuple[nn.Module, Tensor]] = [
    *((kind(), X) for kind in (nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU)),
    *((kind(), X) for kind in (nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid)),
    *((kind(), X) for kind in (nn.Softplus, nn.Softsign, nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout2d)),
    (nn.Dropout1d(), X.flatten(2)),
    *((kind(dim=1), X) for kind in (nn.GLU, nn.Softmax, nn.LogSoftmax)),
    *(
        (nn.GELU(approximate="tanh"), X),
        (nn.LeakyReLU(0.3), X),
        (nn.Softplus(2.0, 1.0), X),
        (nn.Hardtanh(-0.1, 0.2), X),
    ),
    *((kind(output), X) for kind in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d) for output in (3, (None, 2), 9)),
    *((nn.AvgPool2d(3, 2, 1, True, False), X), (nn.AvgPool2d(2, divisor_override=3), X), (nn.MaxPool2d(3, 1, 1, 1), X)),
    *((nn.MaxPool2d(2, ceil_mode=True), X[..., :3]), (nn.PixelShuffle(2), X), (nn.ChannelShuffle(4), X)),
    *((nn.Flatten(2), X), (nn.GroupNorm(2, 8), X), (nn.LayerNorm([6, 4]), X), (nn.InstanceNorm2d(8, affine=True), X)),
    *((nn.BatchNorm2d(8), X), (nn.BatchNorm2d(8, track_running_stats=False), X), (nn.BatchNorm1d(8), X.flatten(2))),
    *((nn.InstanceNorm2d(8, track_running_stats=True), X), (nn.Linear(4, 5), X), (nn.Linear(4, 5, bias=False), X)),
    *(
        (nn.Conv1d(8, 4, 3, padding=2), X.flatten(2)),
        (nn.Conv2d(8, 4, 3, 2, 1, 2, 2), X),
        (nn.Conv2d(8, 4, 3, padding="same"), X),
    ),
    *((nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, 2, False, 1), X), (nn.ConvTranspose2d(8, 6, (2, 4), 3, dilation=2), X)),
    *((nn.ReflectionPad2d((1, 2, 3, 0)), X), (nn.ReplicationPad2d(2), X), (nn.ZeroPad2d((1, 0, 2, 3)), X)),
    *((nn.Upsample(scale_factor=2), X), (nn.Upsample((5, 9), mode="bilinear"), X), (nn.Upsample(scale_factor=1.7), X)),
    *((kind(output), LINES) for kind in (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d) for output in (5, 30)),
    *(
        (nn.AvgPool1d(3, 2, 1, True, False), LINES),
        (nn.AvgPool1d(5), LINES),
        (nn.MaxPool1d(3, 2, 1, 2, False, True), LINES),
    ),
    *((nn.ReflectionPad1d((1, 2)), LINES), (nn.ReplicationPad1d(2), LINES), (nn.ZeroPad1d((0, 3)), LINES)),
    *((AttentiveRegularization2d(8), X), (AttentiveRegularization2d(8, clip=True, scale_unit=1.0), X)),
    (AttentiveRegularization2d(8, attention="gaussian", rho=0.4, clip=True), X),
]


def prepared(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.2, 0.9)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and "running" in name:
            nn.init.uniform_(buffer, 0.2, 0.9)
    return module.eval().requires_grad_(False)


def test_every_kind_of_module_is_tried() -> None:
    assert {type(module) for module, _ in MODULES} == set(_MODULES)


@pytest.mark.parametrize(
    ("module", "x"), MODULES, ids=lambda value: str(value)[:40] if isinstance(value, nn.Module) else ""
)
def test_modules_as_functions(module: nn.Module, x: Tensor) -> None:
    name, arguments = as_function(prepared(module))
    function = VOCABULARY[name]
    expected = module(x)
    assert_near(function(x, **arguments), expected)
    made = guard._MADE.get(name.split(".")[1], guard._broadcast)
    assert made(x, **arguments) >= expected.numel()


def test_other_modules_are_none() -> None:
    class Own(nn.ReLU):
        pass

    for module in (Own(), nn.LSTM(3, 3), nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), nn.LPPool2d(2, 2)):
        assert as_function(module) is None


def test_names() -> None:
    assert function_name(torch.cat) == "torch.cat"
    assert function_name(nn.functional.gelu) == "functional.gelu"
    assert method_name("view") == method_name("view_") == "Tensor.view"
    assert [function_name(other) for other in (print, eval, torch.load, {}, nn.ReLU())] == [None] * 5
    assert method_name("__reduce__") is None
    assert method_name("numpy") is None
    allowed = {"abs", "size", "shape"}
    assert allowed <= {getattr(f, "name", "") for f in VOCABULARY.values() if isinstance(f, Method | Attribute)}


CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("torch.cat", ([X, X],), {"dim": 1}),
    ("torch.stack", ((X, X, X),), {}),
    ("torch.matmul", (X, torch.zeros(5, 1, 8, 4, 7)), {}),
    ("torch.matmul", (X, torch.zeros(4, 7)), {}),
    ("torch.bmm", (X[0], torch.zeros(8, 4, 9)), {}),
    ("Tensor.expand", (X[:, :1], -1, 9, -1, -1), {}),
    ("Tensor.expand", (X[:, :1], (3, 9, 6, 4)), {}),
    ("Tensor.expand_as", (X[:, :1], X), {}),
    ("functional.affine_grid", (torch.zeros(2, 2, 3), [2, 1, 9, 7]), {"align_corners": False}),
    ("functional.grid_sample", (X, torch.zeros(3, 11, 12, 2)), {"align_corners": False}),
    ("functional.interpolate", (X, 11), {}),
    ("functional.interpolate", (X,), {"scale_factor": (2.3, 1.0), "mode": "nearest"}),
    ("functional.pad", (X, (1, 2, 3, 4, 5, 6)), {}),
    ("functional.linear", (X, torch.zeros(7, 4)), {}),
    ("functional.conv2d", (X, torch.zeros(5, 8, 3, 3), None, 1, (4, 5)), {}),
    ("functional.conv_transpose2d", (X, torch.zeros(8, 5, 3, 3), None, 3, 0, 2, 1, 4), {}),
    ("functional.max_pool2d", (X, 2, 1, 1), {}),
    ("operator.add", (X[:, :, :, :1], X[:, :, :1]), {}),
    ("torch.where", (X > 0, X, torch.zeros(5, 1, 1, 1, 1)), {}),
    ("torch.mean", (X, (2, 3)), {"keepdim": True}),
    ("torch.chunk", (X, 3, 1), {}),
    ("Tensor.split", (X, [2, 6], 1), {}),
    ("Tensor.view", (X, 3, -1), {}),
    ("operator.getitem", (X, (slice(None), None, 0, Ellipsis)), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), CALLS, ids=[name for name, *_ in CALLS])
def test_no_call_makes_more_than_is_known_before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    result = VOCABULARY[name](*args, **kwargs)
    made = guard._MADE.get(name.split(".")[1], guard._broadcast)
    numbers = sum(tensor.numel() for tensor in (result if isinstance(result, tuple) else (result,)))
    assert made(*args, **kwargs) >= numbers


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("functional.relu", (X, True)),
        ("functional.silu", (X, True)),
        ("functional.hardtanh", (X, 0.0, 1.0, True)),
        ("functional.dropout", (X, 0.5)),
        ("functional.dropout", (X, 0.5, False, True)),
        ("functional.batch_norm", (X, torch.zeros(8), torch.ones(8), None, None, True)),
        ("Tensor.to", (X, "meta")),
        ("Tensor.to", (X, torch.device("cpu"))),
        ("Tensor.size", ("no tensor",)),
        ("Tensor.shape", ([1, 2],)),
        ("operator.mul", ([1, 2], 10**9)),
        ("operator.mul", ("x", 10**9)),
        ("operator.add", ((1,), (2,))),
        ("operator.pow", (10, 10**9)),
        ("operator.mul", (2**40, 2**40)),
        ("operator.getitem", ({"a": 1}, "a")),
        ("operator.getitem", (X, torch.zeros(10, dtype=torch.int64))),
        ("operator.getitem", (X, [0, 1])),
        ("torch.split", (torch.zeros(5000), 1)),
        ("torch.chunk", (X, 10**9)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_functions_in_files_refuse(name: str, args: tuple[Any, ...]) -> None:
    before = X.clone()
    with pytest.raises((TypeError, ValueError, OverflowError)):
        VOCABULARY[name](*args)
    assert torch.equal(X, before)
