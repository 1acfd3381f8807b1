"""How a network is called and what it returns: tensors in nested lists, tuples and dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Slot:
    """The place of the index-th of some values among nested ones."""

    index: int


@dataclass(frozen=True)
class Form:
    """The arguments of a network's call, by their places and by name, and its result, with slots for the tensors."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    result: Any

    @property  # not cached: the lock of Python 3.11's cached_property is nothing that torch.compile follows
    def takes_one_tensor(self) -> bool:
        """By its place."""
        return self.arguments == ONE_TENSOR.arguments


#: Of a network that takes one tensor and returns one.
ONE_TENSOR = Form(((Slot(0),), {}), Slot(0))


def filled(nested: Any, values: Sequence[Any]) -> Any:
    """Nested values with others in the place of their slots."""
    if isinstance(nested, Slot):
        return values[nested.index]
    if isinstance(nested, dict):
        return {key: filled(value, values) for key, value in nested.items()}
    if type(nested) in (list, tuple):
        return type(nested)(filled(value, values) for value in nested)
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):
        return type(nested)(*(filled(value, values) for value in nested))
    if isinstance(nested, slice):
        return slice(*(filled(part, values) for part in (nested.start, nested.stop, nested.step)))
    return nested


def slotted(nested: Any, is_value: Callable[[Any], bool], values: list[Any]) -> Any:
    """The same with slots in the place of the values, which go to the end of `values`; what is neither stays."""
    if is_value(nested):
        values.append(nested)
        return Slot(len(values) - 1)
    if isinstance(nested, dict):
        return {key: slotted(value, is_value, values) for key, value in nested.items()}
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):
        return type(nested)(*(slotted(value, is_value, values) for value in nested))
    if isinstance(nested, list | tuple):
        made = [slotted(value, is_value, values) for value in nested]
        return tuple(made) if isinstance(nested, tuple) else made
    return nested


def is_size(value: object) -> bool:
    """Whether it is the size of one image, (C, H, W) or (C, L), or of one vector, (features,)."""
    if not isinstance(value, tuple | list) or len(value) not in (1, 2, 3):
        return False
    return all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in value)


def called_with(input_size: Any) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], list[tuple[int, ...]]]:
    """A network's arguments, with slots for its inputs, and the sizes of these.

    `input_size`: the size of its one argument; or a tuple or list of the sizes of several; or a dictionary of these by
    the arguments' names. Instead of a size an argument may have lists, tuples and dictionaries of sizes. ValueError.
    """
    sizes: list[Any] = []
    form = slotted(input_size, is_size, sizes)
    if not sizes or not only_slots(form):
        raise ValueError(
            f"input_size={input_size!r} must be (channels, height, width), (channels, length) or (features,), or "
            "several of these: a tuple in the order of the network's arguments, or a dictionary by their names"
        )
    shapes = [tuple(size) for size in sizes]
    if isinstance(form, dict):
        return ((), form), shapes
    return (((form,) if isinstance(form, Slot) else tuple(form)), {}), shapes


def only_slots(form: Any) -> bool:
    if isinstance(form, dict):
        return all(isinstance(key, str) and only_slots(value) for key, value in form.items())
    return isinstance(form, Slot) or (isinstance(form, list | tuple) and all(map(only_slots, form)))


def taken(form: Any, given: Any, name: str) -> list[Any]:
    """What lies in `given` where `form` has slots, in their order; ValueError that says where the two differ."""
    found: dict[int, Any] = {}
    _take(form, given, name, found)
    return [found[index] for index in range(len(found))]


def inputs_of(form: Form, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The inputs among a call's arguments; ValueError for arguments of another form."""
    found: dict[int, Any] = {}
    _take(form.arguments[0], args, "the plan's arguments", found)
    _take(form.arguments[1], kwargs, "the plan's arguments by name", found)
    return [found[index] for index in range(len(found))]


def _take(form: Any, given: Any, name: str, found: dict[int, Any]) -> None:
    if isinstance(form, Slot):
        found[form.index] = given
        return
    if isinstance(form, dict):
        if not isinstance(given, dict) or set(given) != set(form):
            raise ValueError(f"{name} must have {_shown(form)}, not {_shown(given)}")
        parts = [(f"{name}[{key!r}]", form[key], given[key]) for key in form]
    elif not isinstance(form, list | tuple):
        if type(given) is not type(form) or (given != form and (given == given or form == form)):  # NaN is no other
            raise ValueError(f"{name} must be {form!r}, not {given!r}")
        return
    else:
        if not isinstance(given, list | tuple) or len(given) != len(form):
            raise ValueError(f"{name} must have {len(form)} items, not {_shown(given)}")
        parts = [(f"{name}[{index}]", part, given[index]) for index, part in enumerate(form)]
    for where, part, value in parts:
        _take(part, value, where, found)


def _shown(given: Any) -> str:
    if isinstance(given, dict):
        return ", ".join(map(repr, given)) or "none"
    return str(len(given)) if isinstance(given, list | tuple) else f"a {type(given).__name__}"
