"""Weights of an earlier training as the start of a network."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tkn.adaptive import locator_parameters
from tkn.app.messages import first_line
from tkn.decay import attention_parameters
from tkn.models.stem import first_convolution
from tkn.several import PartsConvNd

_log = logging.getLogger(__name__)

#: How the names in a checkpoint of tkn-run begin.
RUN_PREFIX = "model."


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors by name in a file: a state dict of `torch.save`, safetensors, or a checkpoint of tkn-run.

    Nothing but tensors and plain data is unpickled. FileNotFoundError if it is not there, ValueError if it holds none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model.weights={path} is not a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds
        raise ValueError(f"model.weights={path} is damaged or no file of weights: {first_line(error)}") from error
    if isinstance(content, dict) and "tkn" in content:
        return run_weights(content)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"model.weights={path} holds no tensors by name")
    return content


def run_weights(checkpoint: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of the tested network in a checkpoint of tkn-run."""
    tensors = checkpoint["state_dict"].items()
    return {name.removeprefix(RUN_PREFIX): value for name, value in tensors if name.startswith(RUN_PREFIX)}


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor], what: str) -> set[str]:
    """Put `weights` into `model`, and return the names of the parameters that got one.

    The classifier, the last layer by definition, may be of another number of classes: it then keeps its own. Colour
    kernels of the first convolution are summed for grey images, and a dense convolution's shared among the parts of a
    `PartsConv2d`. loc, scale and locators need not be there. ValueError, which names what differs, if anything else is
    missing, left over or of another shape; `what`: its beginning.
    """
    given = dict(weights)
    own = model.state_dict()
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        first, conv = first_convolution(model)
        colour = given.get(f"{first}.weight")
        if conv.in_channels == 1 and colour is not None and colour.shape[1:2] == (3,):
            given[f"{first}.weight"] = colour.sum(dim=1, keepdim=True)
    for name, parts in model.named_modules():
        if isinstance(parts, PartsConvNd):
            given |= parts.shared_state(given, f"{name}." if name else "")
    new = _other_classifier(model, own, given)
    if new:
        _log.info("%s: the classifier %s starts anew, for it is of other classes", what, ", ".join(sorted(new)))
    optional = attention_parameters(model) | locator_parameters(model) | new
    differences = [
        *_named("has no", [name for name in own if name not in given.keys() | optional]),
        *_named("has", [name for name in given if name not in own]),
        *_named("has another shape of", [n for n in own if n in given.keys() - new and _differs(own, given, n)]),
    ]
    if differences:
        raise ValueError(f"{what} is not of this network: it {', '.join(differences)}")
    model.load_state_dict({name: value for name, value in given.items() if name not in new}, strict=False)
    return {name for name, _ in model.named_parameters() if name in given and name not in new}


def _other_classifier(model: nn.Module, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> set[str]:
    """The classifier's parameters, if `given` ones differ in their first dimension, the classes, alone."""
    *_, last = (
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    )
    names = {name for name in own.keys() & given.keys() if name.rpartition(".")[0] == last}
    others = {name for name in names if _differs(own, given, name)}
    alike = all(own[name].shape[1:] == given[name].shape[1:] for name in names)
    return names if others == names and alike else set()


def _differs(own: Mapping[str, Tensor], given: Mapping[str, Tensor], name: str) -> bool:
    return own[name].shape != given[name].shape


def _named(verb: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{verb} {names[0]}{more}"]
