"""What `torch.utils.flop_counter` counts for the operators: two operations for each multiply-add inside the ROIs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from tkn.roi import roi_areas, roi_bounds
from tkn.spec import Target, decode, spec_of


def layer_macs(x_shape: Sequence[int], targets: Sequence[Target]) -> list[int]:
    """Multiply-adds of each layer inside its ROIs for a batch of `x_shape` [B, C, *size] or one image [C, *size].

    Over the whole map for a layer that does not clip, or whose ROIs have no numbers yet (meta and fake tensors).
    """
    dims = targets[0].spec.dims
    images, size = prod(x_shape[: len(x_shape) - 1 - dims]), tuple(x_shape[-dims:])
    macs = []
    for target in targets:
        output = target.output_size(size)
        per_pixel = prod(target.weight.shape[1:])
        macs.append(per_pixel * (_pixels(target, output) if target.per_image else images * _pixels(target, output)))
        size = target.result_size(size)
    return macs


def _pixels(target: Target, output: tuple[int, ...]) -> int:
    """Output pixels inside the ROIs of all kernels; of all images where each has its own."""
    outputs = target.weight.shape[0]
    known = not isinstance(target.loc, FakeTensor) and target.loc.device.type != "meta"
    if not target.spec.clip or not known:
        return outputs * prod(output) * (len(target.loc) if target.per_image else 1)
    loc, scale = (t if t.dim() == 2 else t.transpose(0, 1).flatten(1) for t in (target.loc, target.scale))
    return int(roi_areas(roi_bounds(output, loc, scale)).sum())


def _of_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, loc: Tensor, scale: Tensor, *options: Any, **_kwargs: Any
) -> int:
    return 2 * sum(layer_macs(x.shape, [Target(spec_of(*options[:-1]), weight, bias, loc, scale)]))


def _of_layers(
    x: Tensor, tensors: Sequence[Tensor], layers: str, scale_units: Sequence[float], *_args: Any, **_kwargs: Any
) -> int:
    return 2 * sum(layer_macs(x.shape, decode(tensors, layers, scale_units)))


def _of_backward(
    _grad: Tensor,
    x: Tensor,
    tensors: Sequence[Tensor],
    _room: Tensor,
    layers: str,
    scale_units: Sequence[float],
    _engine: str,
    needs: Sequence[bool],
    **_kwargs: Any,
) -> int:
    """The gradient of a layer's input costs what the layer does, that of its weight as much."""
    targets = decode(tensors, layers, scale_units)
    needed, total, position = needs[0], 0, 1
    for macs, target in zip(layer_macs(x.shape, targets), targets, strict=True):
        total += macs * (needed + needs[position])
        own = len(target.tensors)
        needed = needed or any(needs[position : position + own])
        position += own
    return 2 * total


def register() -> None:
    """Tell torch's counter."""
    register_flop_formula(torch.ops.tkn.target_conv, get_raw=True)(_of_conv)
    register_flop_formula([torch.ops.tkn.target_sequence, torch.ops.tkn.target_forward], get_raw=True)(_of_layers)
    register_flop_formula(torch.ops.tkn.target_backward, get_raw=True)(_of_backward)
