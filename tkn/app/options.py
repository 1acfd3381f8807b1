"""Options that a function's signature declares: wrong names and types are errors of one line that name the key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from tkn.app.messages import unknown


def option_types(function: Callable[..., Any], not_options: Iterable[str] = ()) -> dict[str, Any]:
    """The types of a function's arguments by name, without its result's and those `not_options`."""
    excluded = {"return", *not_options}
    return {name: hint for name, hint in get_type_hints(function).items() if name not in excluded}


def check_options(group: str, name: str, options: Mapping[str, Any], accepted: Mapping[str, Any]) -> None:
    """ValueError if one of `options` of `group`=`name` is not `accepted` (types by name), or not of its type.

    A dataclass as a type accepts a mapping with its fields' names and types too.
    """
    for option, value in options.items():
        if option not in accepted:
            raise ValueError(unknown(f"key of {group}={name}", option, accepted))
        hint = accepted[option]
        if is_dataclass(hint) and isinstance(value, Mapping):
            inside = {f"{option}.{key}": kind for key, kind in get_type_hints(hint).items()}
            check_options(group, name, {f"{option}.{key}": inner for key, inner in value.items()}, inside)
        elif not _fits(value, hint):
            raise ValueError(f"{group}.{option}={value!r} must {_wanted(f'{group}.{option}', value, hint)}")


def _wanted(key: str, value: object, hint: Any) -> str:
    """What an option's value must be or have, in words that follow "must"."""
    if is_dataclass(hint):
        return f"have the keys {', '.join(get_type_hints(hint))}"
    text = f"be of type {getattr(hint, '__name__', hint)}"
    if isinstance(value, int | float) and _fits("", hint):  # a text that YAML reads as something else
        text += f": quote it, for the shell too, as in '{key}=\"{value}\"'"
    return text


def _fits(value: object, hint: Any) -> bool:
    """Whether `value` is of the type `hint`: a class, list[class], dict, or a union of these."""
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    # A bool is an int to Python, and an int does for a float.
    return type(value) is hint or (hint is float and type(value) is int)
