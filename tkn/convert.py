"""Any CNN to its Targeted Kernel Network: chosen convolutions become target layers that keep their weights."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import nn

from tkn.app.messages import unknown
from tkn.decay import attention_parameters, own_exclusions
from tkn.kinds import target_layer
from tkn.layers import MinSize, RoiLayer, TargetConvNd
from tkn.macs import count_macs
from tkn.ops.engines import Engine
from tkn.sequential import TargetSequential
from tkn.several import Combine, PartsConvNd

#: The convolutions that can be targeted, and their dimensions.
_DIMS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}

#: Less of the multiply-adds than this is said.
_SMALL_SHARE = 0.5


def targetize(
    model: nn.Module,
    layers: Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    *,
    attention: str = "flat",
    scale_unit: float = 0.5,
    min_size: MinSize = 3,
    clip: bool = True,
    engine: Engine = "auto",
    windows: int = 1,
    combine: Combine = "max",
    adaptive: bool = False,
    blocks: Mapping[str, int] | None = None,
    inplace: bool = False,
    input_size: tuple[int, ...] | None = None,
) -> nn.Module:
    """Replace convolutions of `model` by target layers of the same weights (Sec. 4.3: "drop in").

    With the default attention the model computes at the start what it did: its windows are 1 on the whole map. The
    paper's two, "cauchy" and "gaussian", are lower towards the map's border from the start, which a trained network
    does not survive without training.

    Args:
        layers: which plain convolutions (not subclasses or parametrized ones): names as in `model.named_modules()`, or
            a function (name, module) -> bool over them; "all"; by default all with a kernel larger than one pixel.
        attention, scale_unit, min_size, clip, engine: as in `TargetConv2d`, whose default attention is another.
        windows, combine: several windows of each output channel: the "max" or "sum" of them (`MixtureConv2d`), or as
            many kernels with a window each, in "parts" (`PartsConv2d`), whose weights and biases are new parameters, of
            K times as many kernels. At the start these windows are a little apart, which lets the model compute about
            what it did, and their sum that many times over.
        adaptive: ROIs that follow the image (`AdaptiveConv2d`).
        blocks: the power of beta in each layer's scale penalty, by name; 0 for layers not named.
        inplace: change `model` itself (its modules and parameters stay the same objects) instead of a copy.
        input_size: of an image, (C, H, W): warns if the chosen layers do less than half of the multiply-adds, for their
            ROIs can save no others.

    Returns the targeted model; at the start every ROI is the whole map. All else of a convolution stays: its hooks,
    attributes, mode, and the type, device, memory format and requires_grad of its parameters; loc and scale have the
    weight's type and device, and require gradients. The model's `no_weight_decay()` names loc and scale beside what it
    named before. ValueError for a name that is not there or not a plain convolution, if nothing is chosen, for an
    attribute that a target layer would overwrite, and for parts of a convolution that shares its weights with another;
    `model` is then as it was.
    """
    if not inplace:
        model = copy.deepcopy(model)
    convolutions = {name: module for name, module in model.named_modules() if type(module) in _DIMS}
    chosen = _choose(model, convolutions, layers)
    for name in set(blocks or ()) - set(chosen):
        raise ValueError(unknown("layer in blocks", name, chosen))
    kind = partial(target_layer, windows=windows, combine=combine, adaptive=adaptive)
    # All of them first: what is impossible shows before anything is changed.
    targets = {
        conv: _target_layer(
            name,
            conv,
            attention=attention,
            scale_unit=scale_unit,
            min_size=min_size,
            clip=clip,
            block=(blocks or {}).get(name, 0),
            engine=engine,
            kind=kind,
        )
        for name, conv in chosen.items()
    }
    if windows > 1 and combine == "parts":
        _require_own_weights(model, chosen)
    for conv, target in targets.items():
        _become(conv, target)
    for parent in model.modules():
        if type(parent) is nn.Sequential and any(child in targets for child in parent):
            parent.__class__ = TargetSequential
    if not isinstance(model, RoiLayer):
        # The names, and no method bound to the model, which could not be unpickled.
        names = attention_parameters(model) | own_exclusions(model)
        model.no_weight_decay = partial(set, names)  # type: ignore[assignment]
    if input_size is not None:
        _warn_of_small_share(model, input_size, all_chosen=len(chosen) == len(convolutions))
    return model


def _warn_of_small_share(model: nn.Module, input_size: tuple[int, ...], *, all_chosen: bool) -> None:
    share = count_macs(model, input_size).targeted_share
    if share < _SMALL_SHARE:
        more = "" if all_chosen else "; layers='all' targets every convolution"
        warnings.warn(
            f"target layers do {share:.0%} of the multiply-adds of {type(model).__name__} on images of "
            f"{tuple(input_size)}: ROIs can't save others'{more}",
            stacklevel=3,
        )


def _choose(
    model: nn.Module,
    convolutions: dict[str, nn.Module],
    layers: Iterable[str] | Callable[[str, nn.Module], bool] | None,
) -> dict[str, nn.Module]:
    if layers == "all" and "all" not in dict(model.named_children()):
        chosen = convolutions
    elif layers is None:
        chosen = {name: conv for name, conv in convolutions.items() if max(conv.kernel_size) > 1}  # type: ignore
    elif callable(layers):
        chosen = {name: conv for name, conv in convolutions.items() if layers(name, conv)}
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in names:
            if name not in modules:
                raise ValueError(unknown("layer", name, convolutions))
            if type(modules[name]) not in _DIMS:
                raise ValueError(
                    f"layer {name!r} is a {type(modules[name]).__name__}, not a plain nn.Conv1d, nn.Conv2d or nn.Conv3d"
                )
        chosen = {name: modules[name] for name in names}
    if not chosen:
        raise ValueError(f"nothing to target: {type(model).__name__} has no convolution that `layers` chooses")
    return chosen


def _target_layer(
    name: str, conv: nn.Module, kind: Callable[[int], Callable[..., TargetConvNd]], **options: object
) -> TargetConvNd:
    """The target layer that `conv` is to be, on the meta device: it has no values, and draws no random ones."""
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if "weight" not in conv._parameters:
        raise ValueError(f"the weight of {conv} is not a plain parameter (weight_norm, pruning): make it one first")
    geometry = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    target = kind(_DIMS[type(conv)])(
        *geometry, conv.groups, conv.bias is not None, device="meta", dtype=conv.weight.dtype, **options
    )
    plain = type(conv)(1, 1, 1, device="meta")
    needed = (set(dir(target)) - set(dir(plain))) | {"forward", "_conv_forward"}
    taken = sorted(needed & {*vars(conv), *conv._parameters, *conv._buffers, *conv._modules})
    if taken:
        raise ValueError(f"layer {name!r} has attributes that a target layer needs: {', '.join(taken)}")
    return target


def _require_own_weights(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """ValueError if a chosen convolution's weight or bias is also another module's."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for name, conv in chosen.items():
        for key, parameter in conv.named_parameters(recurse=False):
            if owners[id(parameter)] > 1:
                raise ValueError(
                    f"layer {name!r} shares its {key} with another, and parts have more kernels: choose windows of one "
                    "convolution (combine='max' or 'sum'), or other layers"
                )


def _become(conv: nn.Module, target: TargetConvNd) -> None:
    """Make `conv` the layer `target`, with the values that it has; loc and scale start as the whole map."""
    conv.__class__ = type(target)
    assert isinstance(conv, TargetConvNd)
    for name, value in vars(target).items():
        if name not in vars(conv):
            setattr(conv, name, value)
    for name, parameter in target.named_parameters(recurse=False):
        if name not in conv._parameters:
            conv.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device=conv.weight.device)))
    for name, child in target.named_children():
        conv.add_module(name, child.to_empty(device=conv.weight.device).train(conv.training))
        child.reset_parameters()  # type: ignore[operator]  # torch's convention
    if isinstance(conv, PartsConvNd):
        conv.take_kernels_(conv.weight, conv.bias)
    conv.reset_attention()
