"""What torch may compute in a plan's file: functions by name."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.attention import attention_function, correlated_gaussian_window, separable_window
from tkn.roi import roi_bounds, roi_mask

#: No number or count of pieces that a file computes may be larger.
_LARGEST, _MOST_PIECES = 2**62, 1024


@dataclass(frozen=True)
class Method:
    """Calls the method `name` of a tensor."""

    name: str

    def __call__(self, target: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(target, Tensor):
            raise TypeError(f"{self.name} is called of a {type(target).__name__}, not of a tensor")
        return getattr(target, self.name)(*args, **kwargs)


@dataclass(frozen=True)
class Attribute:
    """The attribute `name` of a tensor."""

    name: str

    def __call__(self, target: Tensor) -> Any:
        if not isinstance(target, Tensor):
            raise TypeError(f"{self.name} is asked of a {type(target).__name__}, not of a tensor")
        return getattr(target, self.name)


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of tensors and numbers only: lists and whole numbers could grow without end."""

    @wraps(function)
    def compute(*operands: Any) -> Any:
        tensors = [isinstance(operand, Tensor) for operand in operands]
        if not all(
            tensor or isinstance(operand, int | float) for tensor, operand in zip(tensors, operands, strict=True)
        ):
            raise TypeError(f"{function.__name__} is of tensors and numbers")
        if function is operator.pow and not any(tensors):
            raise TypeError("pow is of tensors")
        result = function(*operands)
        if isinstance(result, int) and abs(result) > _LARGEST:
            raise OverflowError(f"{function.__name__} gives too large a number")
        return result

    return compute


def _item(target: Any, index: Any) -> Any:
    if not isinstance(target, Tensor | tuple | list):
        raise TypeError(f"getitem is of tensors and sequences, not of a {type(target).__name__}")
    for part in index if isinstance(index, tuple) else (index,):
        if not (part is None or part is Ellipsis or isinstance(part, int | slice)):
            raise TypeError(f"items are chosen by numbers and slices, not by a {type(part).__name__}")
    return target[index]


def _few(function: Callable[..., Any]) -> Callable[..., Any]:
    """Into a limited number of pieces."""

    @wraps(function)
    def cut(x: Tensor, pieces: int | list[int], dim: int = 0) -> Any:
        count = len(pieces) if isinstance(pieces, list | tuple) else pieces
        if function.__name__ == "split" and isinstance(pieces, int):
            count = x.shape[dim] // max(1, pieces)
        if count > _MOST_PIECES:
            raise ValueError(f"{function.__name__} makes more than {_MOST_PIECES} pieces")
        return function(x, pieces, dim)

    return cut


def _to(x: Tensor, other: torch.dtype | Tensor | str) -> Tensor:
    """Of another type, or of another tensor's; and to the CPU, where it is."""
    if isinstance(other, str) and other == "cpu":
        return x
    if not isinstance(other, torch.dtype | Tensor):
        raise TypeError(f"a plan's tensors stay on the CPU, not {other!r}")
    return x.to(other if isinstance(other, torch.dtype) else other.dtype)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if training or inplace:
        raise ValueError("dropout in training depends on chance")
    return F.dropout(x, p, False)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training and (running_mean is not None or running_var is not None):
        raise ValueError("a normalisation in training changes its own means")
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


def attend(
    x: Tensor,
    loc: Tensor,
    scale: Tensor,
    rho: Tensor | None,
    attention: str,
    scale_unit: float,
    clip: bool,
) -> Tensor:
    """x [B, C, H, W] times its channels' windows (Eq. 14), zero outside of the ROIs if `clip`; loc, scale: [2, C]."""
    size = (x.shape[-2], x.shape[-1])
    if rho is None:
        window = separable_window(size, loc, scale, attention_function(attention), scale_unit)
    else:
        window = correlated_gaussian_window(size, loc, scale, rho, scale_unit)
    if clip:
        window = torch.where(roi_mask(size, roi_bounds(size, loc, scale)), window, 0.0)
    return x * window


def identity(x: Any) -> Any:
    return x


def _out_of_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which must not write into its input: that may be a weight, or the user's."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a builtin: none of them has the option
        return function
    if "inplace" not in parameters:
        return function
    position = list(parameters).index("inplace")

    @wraps(function)
    def compute(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("inplace") or (len(args) > position and args[position]):
            raise ValueError(f"{function.__name__} in place")
        return function(*args, **kwargs)

    return compute


_FUNCTIONAL = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d affine_grid avg_pool1d
    avg_pool2d celu channel_shuffle conv1d conv2d conv_transpose2d elu gelu glu grid_sample group_norm hardsigmoid
    hardswish hardtanh instance_norm interpolate layer_norm leaky_relu linear log_softmax logsigmoid max_pool1d
    max_pool2d mish normalize pad pixel_shuffle prelu relu relu6 selu silu softmax softplus softsign
"""
_TORCH = """
    abs add amax amin bmm cat clamp div exp flatten log log_softmax matmul maximum mean minimum mul permute pow
    relu reshape rsqrt sigmoid softmax sqrt square squeeze stack sub sum tanh transpose unsqueeze where
"""
_METHODS = """
    abs add amax amin bmm clamp contiguous dim div double exp expand expand_as flatten float log log_softmax
    matmul maximum mean minimum mul permute pow relu reshape reshape_as rsqrt sigmoid size softmax sqrt square
    squeeze sub sum t tanh transpose unflatten unsqueeze view view_as
"""
_ATTRIBUTES = ("dtype", "ndim", "shape")
_OPERATORS = ("add", "floordiv", "matmul", "mul", "neg", "pow", "sub", "truediv")

#: The functions that a file may name.
VOCABULARY: dict[str, Callable[..., Any]] = {
    **{f"functional.{name}": _out_of_place(getattr(F, name)) for name in _FUNCTIONAL.split()},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH.split()},
    **{f"Tensor.{name}": Method(name) for name in _METHODS.split()},
    **{f"Tensor.{name}": Attribute(name) for name in _ATTRIBUTES},
    **{f"operator.{name}": _arithmetic(getattr(operator, name)) for name in _OPERATORS},
    "operator.getitem": _item,
    "functional.batch_norm": _batch_norm,
    "functional.dropout": _dropout,
    "torch.chunk": _few(torch.chunk),
    "torch.split": _few(torch.split),
    "Tensor.chunk": _few(Tensor.chunk),
    "Tensor.split": _few(Tensor.split),
    "Tensor.to": _to,
    "tkn.attend": attend,
    "tkn.identity": identity,
}
#: Names of functions as a traced network calls them.
_NAMES: dict[Hashable, str] = {
    **{getattr(torch, name): f"torch.{name}" for name in (*_TORCH.split(), "chunk", "split")},
    **{getattr(F, name): f"functional.{name}" for name in (*_FUNCTIONAL.split(), "batch_norm", "dropout")},
    **{getattr(operator, name): f"operator.{name}" for name in (*_OPERATORS, "getitem")},
    **{getattr(operator, f"i{name}"): f"operator.{name}" for name in ("add", "sub", "mul", "truediv")},
}


def original(name: str) -> Callable[..., Any]:
    """The function of that name as a network calls it, in place too."""
    return getattr(VOCABULARY[name], "__wrapped__", VOCABULARY[name])


def function_name(function: object) -> str | None:
    """The name of a function, or of the one that computes the same out of place; None if it has none."""
    return _NAMES.get(function) if isinstance(function, Hashable) else None


def method_name(method: str) -> str | None:
    """As `function_name`, of a tensor's method or attribute."""
    name = f"Tensor.{method.removesuffix('_')}"
    return name if name in VOCABULARY else None
