"""The honest rival: a dense network with narrower convolutions, of as many multiply-adds as a targeted one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from math import lcm

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from tkn.app.messages import first_line
from tkn.macs import count_macs
from tkn.models.paper import initialise_all
from tkn.models.widths import set_width

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
    """`model` with the convolutions' widths times `factor`; what follows them takes the channels that arrive.

    The layers stay of their own classes, which may compute more than torch's.
    """
    scaled = copy.deepcopy(model).eval()
    children = dict.fromkeys(child for parent in scaled.modules() for child in parent.children())
    convolutions = [child for child in children if isinstance(child, nn.Conv1d | nn.Conv2d)]
    outputs = {conv: conv.out_channels for conv in convolutions}
    for index, conv in enumerate(convolutions if with_last else convolutions[:-1]):
        phase = index * _GOLDEN % 1 if in_turns else 0.5
        outputs[conv] = _width(conv.out_channels, factor, multiple, phase)
    hooks: dict[nn.Module, RemovableHandle] = {}

    def take_what_arrives(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hooks[module].remove()
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            width = outputs[module]
            groups = width // (module.out_channels // module.groups) if module.groups > 1 else 1
            arriving = inputs[0].shape[1]
            if arriving % groups:
                raise ValueError(f"{arriving} channels can't be parted into {groups} groups")
            set_width(module, (arriving, width, groups))
        elif isinstance(module, nn.Linear):
            set_width(module, (inputs[0].shape[-1], module.out_features))
        else:
            set_width(module, (inputs[0].shape[1],))

    for child in children:
        if isinstance(child, nn.Conv1d | nn.Conv2d | nn.Linear | _BatchNorm):
            hooks[child] = child.register_forward_pre_hook(take_what_arrives)
    with torch.no_grad():
        scaled(images)
    return scaled


def _width(width: int, factor: float, multiple: int, phase: float) -> int:
    """`width` times `factor` in whole multiples, rounded up if what is over is at least 1 - `phase` of one."""
    return min(width, max(1, int(factor * width / multiple + phase)) * multiple)
