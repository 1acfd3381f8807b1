"""The honest rival: a dense network with narrower convolutions, of as many multiply-adds as a targeted one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from math import lcm

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from tkn.app.messages import first_line
from tkn.macs import count_macs
from tkn.models.paper import initialise_all

#: Equal convolutions take their steps one after the other, at these distances.
_GOLDEN = 0.6180339887
#: Factors with which a rule of rounding must make a network that works.
_TRIED = (0.3, 0.55, 0.8)


def thin(model: nn.Module, input_size: tuple[int, ...], macs: int, multiple: int = 1) -> nn.Module:
    """A freshly initialised `model` with every convolution's width scaled, as near to `macs` as whole widths allow.

    `model`: a dense network; its fully connected layers keep their widths. `multiple`: widths are multiples of this and
    of the outputs of a group. Where maps are summed, equal widths stay equal. ValueError for a network whose own code
    needs its widths.
    """
    multiple = lcm(multiple, *(conv.out_channels // conv.groups for conv in _convolutions(model) if conv.groups > 1))
    scaled = _rule_for(model, input_size, multiple)
    low, high = 0.0, 1.0
    try:
        # The count grows with the factor in steps; after these halvings one step is left between the two.
        for _ in range(20):
            middle = (low + high) / 2
            if _macs(scaled(middle), input_size) < macs:
                low = middle
            else:
                high = middle
        nearest = min((low, high), key=lambda factor: abs(_macs(scaled(factor), input_size) - macs))
    except RuntimeError as error:
        raise _refusal(model, error) from error
    thinned = scaled(nearest).train(model.training)
    initialise_all(thinned)
    return thinned


def _convolutions(model: nn.Module) -> list[nn.Conv1d | nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv2d)]


def _macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    return count_macs(model, input_size).total_dense


def _rule_for(model: nn.Module, input_size: tuple[int, ...], multiple: int) -> Callable[[float], nn.Module]:
    """factor -> the scaled model. Widths are rounded in turns, so that the count comes nearer, where the network allows
    equal widths to become different ones; and the last convolution's too, unless it makes the outputs."""
    images = torch.zeros(1, *input_size)
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval()(images).shape
    failure: Exception = RuntimeError("its outputs would be others")
    for in_turns, with_last in product((True, False), (True, False)):
        if len(_convolutions(model)) < (1 if with_last else 2):
            continue
        scaled = partial(_scaled, model, images, multiple=multiple, in_turns=in_turns, with_last=with_last)
        try:
            if all(scaled(factor)(images).shape == outputs for factor in _TRIED):
                return scaled
        except (RuntimeError, ValueError) as error:
            failure = error
    raise _refusal(model, failure) from failure


def _refusal(model: nn.Module, reason: Exception) -> ValueError:
    return ValueError(f"{type(model).__name__} can't be thinned: {first_line(reason)}")


def _scaled(
    model: nn.Module, images: Tensor, factor: float, *, multiple: int, in_turns: bool, with_last: bool
) -> nn.Module:
    """`model` with the convolutions' widths times `factor`; what follows them takes the channels that arrive."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        scaled = copy.deepcopy(model)
        convolutions, count = 0, len(_convolutions(model))
        for parent in list(scaled.modules()):
            for name, child in list(parent.named_children()):
                lazy: LazyModuleMixin | None = None
                if isinstance(child, nn.Conv1d | nn.Conv2d) and (with_last or convolutions + 1 < count):
                    phase = convolutions * _GOLDEN % 1 if in_turns else 0.5
                    lazy = _lazy_convolution(child, _width(child.out_channels, factor, multiple, phase))
                    convolutions += 1
                elif isinstance(child, nn.Conv1d | nn.Conv2d):
                    lazy = _lazy_convolution(child, child.out_channels)
                elif isinstance(child, nn.BatchNorm2d):
                    lazy = nn.LazyBatchNorm2d(child.eps, child.momentum)
                elif isinstance(child, nn.Linear):
                    lazy = nn.LazyLinear(child.out_features, child.bias is not None)
                elif isinstance(child, _BatchNorm):
                    lazy = nn.LazyBatchNorm1d(child.eps, child.momentum)
                if lazy is not None:
                    setattr(parent, name, lazy)
        scaled.eval()
        with torch.no_grad():
            scaled(images)
    return scaled


def _width(width: int, factor: float, multiple: int, phase: float) -> int:
    """`width` times `factor` in whole multiples, rounded up if what is over is at least 1 - `phase` of one."""
    return min(width, max(1, int(factor * width / multiple + phase)) * multiple)


def _lazy_convolution(conv: nn.Conv1d | nn.Conv2d, width: int) -> nn.LazyConv1d | nn.LazyConv2d:
    return (nn.LazyConv1d if isinstance(conv, nn.Conv1d) else nn.LazyConv2d)(
        width,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        width // (conv.out_channels // conv.groups) if conv.groups > 1 else 1,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
