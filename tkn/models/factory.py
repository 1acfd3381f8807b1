"""A user's own network: a function that makes it, by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from tkn.app.factory import import_function
from tkn.app.messages import message

Factory = Callable[..., nn.Module]


def import_factory(name: str) -> Factory:
    """The function that "package.module:function" names. This runs the module's code.

    ValueError if it is not to be had (see `import_function`).
    """
    return import_function("model.factory", name)


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
