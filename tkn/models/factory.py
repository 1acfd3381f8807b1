"""A user's own network: a function that makes it, by its name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from torch import nn

from tkn.app.messages import message, unknown

Factory = Callable[..., nn.Module]


def import_factory(name: str) -> Factory:
    """The function that "package.module:function" names. This runs the module's code.

    The module is found where Python finds it, and in the working folder. ValueError if there is no such module or
    function, if the module fails, or if what is there cannot be called.
    """
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise ValueError(f"model.factory={name} must be of the form package.module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: it hides nothing
    try:
        module = import_module(module_name)
    except Exception as error:  # the module's own kinds
        raise ValueError(f"model.factory={name} can't be imported: {message(error) or type(error).__name__}") from error
    try:
        factory = getattr(module, function_name)
    except AttributeError as error:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(unknown(f"function in {module_name}: model.factory", function_name, names)) from error
    if not callable(factory):
        raise ValueError(f"model.factory={name} is a {type(factory).__name__}, which can't be called")
    return factory


def call_factory(factory: Factory, input_size: tuple[int, int, int], num_outputs: int) -> nn.Module:
    """The network that `factory` makes: called with the keywords input_size and num_outputs, those that it takes.

    input_size: (C, H, W). ValueError if it fails or gives no `nn.Module`.
    """
    name = getattr(factory, "__name__", type(factory).__name__)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.factory: the arguments of {name} can't be seen") from error
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    offered = {"input_size": input_size, "num_outputs": num_outputs}
    try:
        model = factory(**{key: value for key, value in offered.items() if anything or key in named})
    except Exception as error:  # the user's own kinds
        raise ValueError(f"model.factory: {name} failed: {message(error) or type(error).__name__}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model.factory: {name} gives a {type(model).__name__}, not a torch.nn.Module")
    return model
