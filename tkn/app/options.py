"""Options that a function's signature declares: wrong names and types are errors of one line that name the key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from tkn.app.messages import unknown


def option_types(function: Callable[..., Any], not_options: Iterable[str] = ()) -> dict[str, Any]:
    """The types of a function's arguments by name, without its result's and those `not_options`."""
    excluded = {"return", *not_options}
    return {name: hint for name, hint in get_type_hints(function).items() if name not in excluded}


def check_options(group: str, name: str, options: Mapping[str, Any], accepted: Mapping[str, Any]) -> None:
    """ValueError if one of `options` of `group`=`name` is not `accepted` (types by name), or not of its type."""
    for option, value in options.items():
        if option not in accepted:
            raise ValueError(unknown(f"key of {group}={name}", option, accepted))
        if not _fits(value, accepted[option]):
            hint = accepted[option]
            raise ValueError(f"{group}.{option}={value!r} must be of type {getattr(hint, '__name__', hint)}")


def _fits(value: object, hint: Any) -> bool:
    """Whether `value` is of the type `hint`: a class, list[class], or a union of these."""
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    # A bool is an int to Python, and an int does for a float.
    return type(value) is hint or (hint is float and type(value) is int)
