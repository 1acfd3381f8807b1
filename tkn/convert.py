"""Any CNN to its Targeted Kernel Network: chosen convolutions become target layers that keep their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from tkn.app.messages import unknown
from tkn.layers import MinSize, TargetConv1d, TargetConv2d, TargetConv3d
from tkn.ops.engines import Engine
from tkn.sequential import TargetSequential

_TARGETS: dict[type[nn.Module], type] = {
    nn.Conv1d: TargetConv1d,
    nn.Conv2d: TargetConv2d,
    nn.Conv3d: TargetConv3d,
}


def targetize(
    model: nn.Module,
    layers: Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    *,
    attention: str = "cauchy",
    scale_unit: float = 0.5,
    min_size: MinSize = 3,
    clip: bool = True,
    engine: Engine = "auto",
    blocks: Mapping[str, int] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Replace convolutions of `model` by target layers of the same weights (Sec. 4.3: "drop in").

    Args:
        layers: which plain convolutions (not subclasses or parametrized ones): names as in `model.named_modules()`, or
            a function (name, module) -> bool over them; by default all with a kernel larger than one pixel.
        attention, scale_unit, min_size, clip, engine: as in `TargetConv2d` (engine: for 2-D convolutions).
        blocks: the power of beta in each layer's scale penalty, by name; 0 for layers not named.
        inplace: change `model` itself (its parameters stay the same objects) instead of a copy.

    Returns the targeted model; at the start every ROI is the whole map. ValueError for a name that is not there, or is
    not a plain convolution, and if nothing is chosen.
    """
    if not inplace:
        model = copy.deepcopy(model)
    convolutions = {name: module for name, module in model.named_modules() if type(module) in _TARGETS}
    chosen = _choose(model, convolutions, layers)
    for name in set(blocks or ()) - set(chosen):
        raise ValueError(unknown("layer in blocks", name, chosen))
    replaced: dict[nn.Module, nn.Module] = {
        conv: _target_layer(
            conv,
            attention=attention,
            scale_unit=scale_unit,
            min_size=min_size,
            clip=clip,
            block=(blocks or {}).get(name, 0),
            **({"engine": engine} if isinstance(conv, nn.Conv2d) else {}),
        )
        for name, conv in chosen.items()
    }
    if model in replaced:
        return replaced[model]
    # Every parent, so that a convolution used in two places stays one.
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child in replaced:
                parent._modules[child_name] = replaced[child]
                if type(parent) is nn.Sequential:
                    parent.__class__ = TargetSequential
    return model


def _choose(
    model: nn.Module,
    convolutions: dict[str, nn.Module],
    layers: Iterable[str] | Callable[[str, nn.Module], bool] | None,
) -> dict[str, nn.Module]:
    if layers is None:
        chosen = {name: conv for name, conv in convolutions.items() if max(conv.kernel_size) > 1}  # type: ignore
    elif callable(layers):
        chosen = {name: conv for name, conv in convolutions.items() if layers(name, conv)}
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in names:
            if name not in modules:
                raise ValueError(unknown("layer", name, convolutions))
            if type(modules[name]) not in _TARGETS:
                raise ValueError(
                    f"layer {name!r} is a {type(modules[name]).__name__}, not a plain nn.Conv1d, nn.Conv2d or nn.Conv3d"
                )
        chosen = {name: modules[name] for name in names}
    if not chosen:
        raise ValueError(f"nothing to target: {type(model).__name__} has no convolution that `layers` chooses")
    return chosen


def _target_layer(conv: nn.Module, **attention: object) -> nn.Module:
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if "weight" not in conv._parameters:
        raise ValueError(f"the weight of {conv} is not a plain parameter (weight_norm, pruning): make it one first")
    layer = _TARGETS[type(conv)](
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        **attention,
    )
    layer.weight = conv.weight
    layer.bias = conv.bias
    return layer.train(conv.training)
