"""The functions of single numbers between a network's layers that the engine knows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tkn.backends.cpu.structs import FunctionStruct

#: name: (the number of nonlinear.h, the function of x and `slope`)
FUNCTIONS: dict[str, tuple[int, Callable[[Tensor, float], Tensor]]] = {
    "relu": (1, lambda x, _: F.relu(x)),
    "relu6": (2, lambda x, _: F.relu6(x)),
    "leaky_relu": (3, F.leaky_relu),
    "elu": (4, F.elu),
    "sigmoid": (5, lambda x, _: torch.sigmoid(x)),
    "silu": (6, lambda x, _: F.silu(x)),
    "hardsigmoid": (7, lambda x, _: F.hardsigmoid(x)),
    "hardswish": (8, lambda x, _: F.hardswish(x)),
    "tanh": (9, lambda x, _: torch.tanh(x)),
    "gelu": (10, lambda x, _: F.gelu(x)),
    "gelu_tanh": (11, lambda x, _: F.gelu(x, approximate="tanh")),
}


@dataclass(frozen=True)
class Nonlinearity:
    """`function`: its name in FUNCTIONS; `slope`: leaky_relu's, or elu's alpha."""

    function: str
    slope: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.function][1](x, self.slope)


@dataclass(frozen=True)
class Relu(Nonlinearity):
    """max(x, 0)"""

    function: str = "relu"


def struct_of(function: Nonlinearity | None) -> FunctionStruct:
    """As the kernels know it."""
    return FunctionStruct() if function is None else FunctionStruct(FUNCTIONS[function.function][0], function.slope)


def module_nonlinearity(module: nn.Module) -> Nonlinearity | None:
    """A module's, if it is one that the engine knows."""
    kind = type(module)
    if kind in _MODULES:
        return _of(_MODULES[kind])
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        return _gelu(module.approximate)
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return Nonlinearity("leaky_relu", float(module.negative_slope))
    if isinstance(module, nn.ELU) and kind is nn.ELU:
        return Nonlinearity("elu", float(module.alpha))
    if isinstance(module, nn.PReLU) and kind is nn.PReLU and module.weight.numel() == 1:
        return Nonlinearity("leaky_relu", float(module.weight.detach()))
    if isinstance(module, nn.Hardtanh):
        return _clamped(min=module.min_val, max=module.max_val)
    return None


def call_nonlinearity(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Nonlinearity | None:
    """That of a function of torch, or a tensor's method by name, called with these arguments beside the input."""
    name = _CALLS.get(target) if isinstance(target, Hashable) else None
    if name is None:
        return None
    if name == "clamp":
        bounds = {"min": -1.0, "max": 1.0} if target is F.hardtanh else {"min": None, "max": None}
        given = {**dict(zip(bounds, args, strict=False)), **{_BOUNDS.get(key, key): kwargs[key] for key in kwargs}}
        known = len(args) <= 2 and set(given) <= set(bounds)
        return _clamped(**{**bounds, **given}) if known else None
    if name in _ARGUMENTS:
        key, default = _ARGUMENTS[name]
        if len(args) > 1 or set(kwargs) - {key} or (args and kwargs):
            return None
        value = args[0] if args else kwargs.get(key, default)
        if name == "gelu":
            return _gelu(value)
        return Nonlinearity(name, float(value)) if isinstance(value, int | float) else None
    return None if args or kwargs else _of(name)


def _clamped(*, min: Any, max: Any) -> Nonlinearity | None:
    """Of these bounds, where that is a function with a name."""
    if type(min) not in (int, float) or min != 0:
        return None
    if max is None:
        return Relu()
    return Nonlinearity("relu6") if type(max) in (int, float) and max == 6 else None


def _of(name: str) -> Nonlinearity:
    return Relu() if name == "relu" else Nonlinearity(name)


def _gelu(approximate: Any) -> Nonlinearity | None:
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    return Nonlinearity(names[approximate]) if approximate in names else None


_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardswish: "hardswish",
    nn.Tanh: "tanh",
}
#: What a number beside the input is called, and what it is where none is given.
_ARGUMENTS: dict[str, tuple[str, Any]] = {
    "leaky_relu": ("negative_slope", 0.01),
    "elu": ("alpha", 1.0),
    "gelu": ("approximate", "none"),
}
#: What hardtanh calls the bounds.
_BOUNDS = {"min_val": "min", "max_val": "max"}
#: Functions, and methods by their names.
_CALLS: dict[Any, str] = {
    **dict.fromkeys((torch.relu, torch.relu_, F.relu, "relu", "relu_"), "relu"),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"), "sigmoid"),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh", "tanh_"), "tanh"),
    **dict.fromkeys((torch.clamp, torch.clamp_, torch.clip, "clamp", "clamp_", "clip", F.hardtanh), "clamp"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardsigmoid: "hardsigmoid",
    F.hardswish: "hardswish",
    F.leaky_relu: "leaky_relu",
    F.elu: "elu",
    F.gelu: "gelu",
}
