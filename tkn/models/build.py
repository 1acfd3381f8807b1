"""`build_model`: any network of the project by its name and options, and which options a name has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tkn.app.messages import message, unknown
from tkn.app.options import check_options, option_types
from tkn.evaluating import evaluating
from tkn.layers import MinSize
from tkn.models import factory as own_code
from tkn.models import library, paper
from tkn.models.names import Names
from tkn.models.stem import STEMS, keep_size_, take_channels_
from tkn.models.targeting import target
from tkn.ops.engines import Engine
from tkn.several import Combine

_NOT_OPTIONS = ("name", "input_size", "_input_size", "num_outputs", "_num_outputs", "attention")
_OWN = {"stem": str | None, "targeted": bool, "layers": Names}

#: The types of each network's options.
_OPTIONS: dict[str, dict[str, Any]] = {
    **{
        name: option_types(paper.targeted_network if targeted else paper.dense_network, _NOT_OPTIONS)
        for name, (_, targeted) in paper.PAPER.items()
    },
    "torchvision": option_types(library.torchvision_network, _NOT_OPTIONS) | _OWN,
    "timm": option_types(library.timm_network, _NOT_OPTIONS) | _OWN,
    "python": {"factory": str, **_OWN},
}

#: The paper's networks.
MODEL_NAMES = tuple(paper.PAPER)


def check_model_options(name: str, options: Mapping[str, Any]) -> None:
    """ValueError if there is no network `name`, or it does not take one of `options`, or not of that type or value.

    Imports the module of a `factory`.
    """
    if name not in _OPTIONS:
        raise ValueError(unknown("model", name, _OPTIONS))
    check_options("model", name, options, _OPTIONS[name])
    for key in {"network", "factory"} & _OPTIONS[name].keys():
        if key not in options:
            raise ValueError(f"model={name} needs model.{key}=...")
    dropout, stem = options.get("dropout"), options.get("stem")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"model.dropout={dropout} must lie within [0, 1)")
    if stem is not None and stem not in STEMS:
        raise ValueError(f"model.stem={stem} must be null or {' or '.join(STEMS)}")
    if options.get("layers") is not None and not is_targeted(name, options):
        raise ValueError(f"model.layers={options['layers']} chooses target layers: it needs model.targeted=true")
    if name == "torchvision":
        library.check_torchvision(options["network"])
    elif name == "timm":
        library.check_timm(options["network"])
    elif name == "python":
        own_code.import_factory(options["factory"])


def takes_option(name: str, option: str) -> bool:
    """Whether the network `name` has the option."""
    return option in _OPTIONS[name]


def is_targeted(name: str, options: Mapping[str, Any]) -> bool:
    """Whether the network has target layers."""
    return name in paper.BASE or bool(options.get("targeted"))


def dense_title(name: str, options: Mapping[str, Any]) -> str:
    """What tables call the dense network that a network is, or is made of."""
    if name in paper.PAPER:
        return paper.BASE.get(name, name)
    return str(options.get("network") or options["factory"].partition(":")[2])


def title(name: str, options: Mapping[str, Any]) -> str:
    """What tables call a network."""
    if name in paper.PAPER:
        return name
    dense = dense_title(name, options)
    return f"targeted {dense}" if is_targeted(name, options) else dense


def build_model(
    name: str,
    input_size: tuple[int, int, int],
    num_outputs: int,
    *,
    attention: str = "cauchy",
    scale_unit: float = 0.5,
    min_size: MinSize = 3,
    clip: bool = True,
    engine: Engine = "auto",
    windows: int = 1,
    combine: Combine = "max",
    adaptive: bool = False,
    factory: own_code.Factory | str | None = None,
    **options: Any,
) -> nn.Module:
    """A network, initialised from torch's random state (the paper's: Sec. 4.2, 4.3, Table 1).

    Args:
        name: cnn6, dn10, dn40, stn, or their targeted versions tkn6, tdn10, tdn40, tstn; torchvision; timm; python.
        input_size: (C, H, W).
        num_outputs: classes, or 1 for regression.
        attention, scale_unit, min_size, clip, engine: as in `TargetConv2d`, for target layers.
        windows, combine, adaptive: other target layers than these (docs/beyond.md), as in `targetize`.
        factory: of python: a function that makes the network, or "package.module:function" (see `call_factory`).
        options: dropout, instead of the network's own probability (of the paper's networks and timm's); layers, what is
            targeted (see `target`); of all but the paper's also `targeted`, network (torchvision's or timm's name) and
            stem ("small": see `keep_size_`).

    Returns a module [B, C, H, W] -> [B, num_outputs], whose ROIs are whole maps. ValueError for an unknown name, an
    impossible argument, an image size that the network can't take, or outputs that are not `num_outputs` numbers.
    """
    if isinstance(factory, str):
        options["factory"] = factory
    if name != "python" or isinstance(factory, str):
        check_model_options(name, options)
    elif factory is None:
        raise ValueError("model=python needs a factory")
    if len(input_size) != 3:
        raise ValueError(f"input_size={tuple(input_size)} must be (channels, height, width)")
    if num_outputs < 1:
        raise ValueError(f"num_outputs={num_outputs} must be at least 1")
    arguments = {
        "attention": attention,
        "scale_unit": scale_unit,
        "min_size": min_size,
        "clip": clip,
        "engine": engine,
        "windows": windows,
        "combine": combine,
        "adaptive": adaptive,
    }
    if name in paper.BASE:
        return paper.targeted_network(name, input_size, num_outputs, arguments, **options)
    if name in paper.PAPER:
        return paper.dense_network(name, input_size, num_outputs, **options)
    shaping = {key: options.pop(key) for key in _OWN if key in options}
    options.pop("factory", None)
    if name == "torchvision":
        model = library.torchvision_network(input_size, num_outputs, **options)
        take_channels_(model, input_size[0])
    elif name == "timm":
        model = library.timm_network(input_size, num_outputs, **options)
    else:
        model = own_code.call_factory(
            own_code.import_factory(factory) if isinstance(factory, str) else factory,  # type: ignore[arg-type]
            input_size,
            num_outputs,
        )
    model.train()  # a factory may have left it in evaluation mode
    if shaping.get("stem"):
        keep_size_(model)
    require_outputs(model, input_size, num_outputs)
    if shaping.get("targeted"):
        target(model, input_size, shaping.get("layers"), arguments)
    return model


def require_outputs(model: nn.Module, input_size: tuple[int, ...], num_outputs: int) -> None:
    """ValueError if `model` can't take such images, or gives something else than `num_outputs` numbers for each."""
    kind = type(model).__name__
    try:
        with evaluating(model):
            outputs = model(torch.zeros(2, *input_size))
    except Exception as error:  # the network's own kinds
        size = "x".join(map(str, input_size))
        raise ValueError(f"{kind} can't take images of {size} (C x H x W): {message(error)}") from error
    if not isinstance(outputs, Tensor) or outputs.shape != (2, num_outputs):
        found = list(outputs.shape) if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ValueError(f"{kind} gives {found} for two images, not [2, {num_outputs}] as the data's targets need")


def default_weights(
    name: str, input_size: tuple[int, int, int], num_outputs: int, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The pretrained weights that the library of a network has; ValueError if there are none, or no connection."""
    given = {key: value for key, value in options.items() if key not in _OWN}
    if name == "torchvision":
        return library.torchvision_weights(input_size, num_outputs, **given)
    if name == "timm":
        return library.timm_weights(input_size, num_outputs, **given)
    raise ValueError(f"model.weights=DEFAULT: {title(name, options)} has no pretrained weights, name a file")
