"""Functions of a user's own, by the names that a configuration gives them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from tkn.app.messages import first_line


def import_function(key: str, name: str) -> Callable[..., Any]:
    """The function "package.module:function", of the installed packages or the working folder.

    ValueError, which names the configuration's `key`, for another form, and for what can't be imported.
    """
    module_name, separator, function_name = name.partition(":")
    if not (separator and module_name and function_name):
        raise ValueError(f"{key}={name} must be package.module:function")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last: a file of the working folder must not hide a package
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"{key}={name}: {module_name} can't be imported ({type(error).__name__}: {first_line(error)})"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{key}={name}: {module_name} has no function {function_name}")
    return function
