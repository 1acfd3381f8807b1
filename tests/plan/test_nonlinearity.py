"""The kernels' functions of single numbers against torch's of float64, also far out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plan_networks import plan_of
from torch import nn
from torch.nn import functional as F

from tkn import accelerate, load_plan
from tkn.plan.nonlinearity import FUNCTIONS, Nonlinearity, Relu, call_nonlinearity, module_nonlinearity

MODULES: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.3),
    "elu": nn.ELU(1.5),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardswish": nn.Hardswish(),
    "tanh": nn.Tanh(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
}


def numbers() -> torch.Tensor:
    """Small, large and special ones: [5, 9, 9, 9]."""
    small, wide = torch.linspace(-1e-3, 1e-3, 1000), torch.linspace(-12, 12, 2500)
    special = torch.tensor([0.0, -0.0, 1e-30, 90.0, -90.0, 1e4, -1e4, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
    found = torch.cat((small, wide, special))
    return torch.cat((found, torch.linspace(-100, 100, 5 * 729 - len(found)))).reshape(5, 9, 9, 9)


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.compact
@torch.no_grad()
def test_functions_equal_torchs(name: str, small: bool) -> None:
    """As a convolution writes, and of the inputs as they are. 9 channels: some vectors hold more, others fewer."""
    copying = nn.Conv2d(9, 9, 1, groups=1, bias=False)
    copying.weight.copy_(torch.eye(9)[:, :, None, None])
    module, x = MODULES[name], numbers()
    finite = torch.where(x.isfinite(), x, 0.5)  # times a weight of zero others are NaN
    for layers, images in (((copying, module), finite), ((module,), x)):
        plan = plan_of(nn.Sequential(*layers), (9, 9, 9), 5, small=small)
        assert plan.fallbacks == ()
        got, expected = plan(images), module(images.double())
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.float().isinf())
        known = got.isfinite()
        error = (got.double() - expected)[known].abs()
        assert (error <= 1e-6 * expected[known].abs() + 5e-7).all(), float(error.max())


def test_modules_and_calls() -> None:
    for name, module in MODULES.items():
        found = module_nonlinearity(module)
        assert found is not None
        assert found.function == name
    weight = nn.PReLU(init=0.125)
    assert module_nonlinearity(weight) == Nonlinearity("leaky_relu", 0.125)
    assert module_nonlinearity(nn.PReLU(2)) is None
    assert module_nonlinearity(nn.Softplus()) is None
    assert call_nonlinearity(F.leaky_relu, (), {}) == Nonlinearity("leaky_relu", 0.01)
    assert call_nonlinearity(F.leaky_relu, (0.5,), {}) == Nonlinearity("leaky_relu", 0.5)
    assert call_nonlinearity(F.elu, (), {"alpha": 2}) == Nonlinearity("elu", 2.0)
    assert call_nonlinearity(F.gelu, (), {"approximate": "tanh"}) == Nonlinearity("gelu_tanh")
    assert call_nonlinearity(F.gelu, (), {"approximate": "other"}) is None
    assert call_nonlinearity(F.elu, (1.0, 2.0), {}) is None
    assert call_nonlinearity(torch.sigmoid, (), {"out": None}) is None
    assert call_nonlinearity("relu_", (), {}) == Relu() == module_nonlinearity(nn.ReLU())
    assert call_nonlinearity([], (), {}) is None


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.no_grad()
def test_files_keep_functions(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plan = accelerate(nn.Sequential(nn.Conv2d(1, 3, 3), MODULES[name]), 2, (1, 5, 5))
    plan.save(tmp_path / "net.plan")
    x = torch.randn(2, 1, 5, 5)
    torch.testing.assert_close(load_plan(tmp_path / "net.plan")(x), plan(x))
