"""A network's calls that torch runs in a plan."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from tkn.plan.arithmetic import IN_PLACE
from tkn.plan.form import Slot
from tkn.plan.graph import Call
from tkn.plan.modules import as_function
from tkn.plan.trace import Seen
from tkn.plan.vocabulary import Attribute, Method, function_name, method_name, original


def torch_call(n: fx.Node, traced: fx.GraphModule, seen: dict[fx.Node, Seen]) -> Call:
    """What torch runs in a call's place; `seen`: what its values were for a batch."""
    call = _call(n, traced, seen)
    if n.op == "call_module":
        return replace(call, overwrites=bool(getattr(traced.get_submodule(str(n.target)), "inplace", False)))
    return replace(call, overwrites=writes_over(n))


def _call(n: fx.Node, traced: fx.GraphModule, seen: dict[fx.Node, Seen]) -> Call:
    slots: dict[fx.Node, Any] = {source: Slot(index) for index, source in enumerate(n.all_input_nodes)}
    args = _plain(fx.map_arg(n.args, slots.__getitem__))
    kwargs = _plain(fx.map_arg(n.kwargs, slots.__getitem__))
    if n.op == "call_module":
        module = traced.get_submodule(str(n.target))
        kind = type(module).__name__
        known = as_function(module) if len(args) == 1 and not kwargs and not has_hooks(module) else None
        if known is None:
            return Call(module, args, kwargs, kind)
        function, arguments = known
        return Call(original(function), args, arguments, kind, function)
    first = seen[n.args[0]].kind if n.args and isinstance(n.args[0], fx.Node) else None
    if n.op == "call_method":
        kind = str(n.target)
        if first is Tensor:
            return Call(Method(kind), args, kwargs, kind, method_name(kind))
        return Call(partial(_call_method, kind), args, kwargs, kind)
    if n.target is getattr and first is Tensor:
        kind = str(args[1])
        return Call(Attribute(kind), args[:1], {}, kind, method_name(kind))
    kind = getattr(n.target, "__name__", str(n.target))
    name = function_name(n.target)
    # The operators in a file are those of tensors and numbers, and of sequences' items.
    if name == "operator.getitem":
        limited = first is not None and issubclass(first, Tensor | tuple | list)
    else:
        limited = name is None or not name.startswith("operator.") or seen[n].kind in (Tensor, int, float)
    return Call(n.target, args, kwargs, kind, name if limited else None)  # type: ignore[arg-type]


def _plain(arguments: Any) -> Any:
    """Without torch.fx's own kinds of lists and dictionaries."""
    if isinstance(arguments, dict):
        return {key: _plain(value) for key, value in arguments.items()}
    if isinstance(arguments, list):
        return [_plain(value) for value in arguments]
    return tuple(_plain(value) for value in arguments) if type(arguments) is tuple else arguments


def _call_method(name: str, target: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(target, name)(*args, **kwargs)


def writes_over(n: fx.Node) -> bool:
    """Whether a call of a function or method writes its result where its first argument is."""
    name = getattr(n.target, "__name__", str(n.target))
    if (name.endswith("_") and not name.endswith("__")) or n.target in IN_PLACE or n.kwargs.get("inplace"):
        return True
    if getattr(n.target, "__module__", "") != F.__name__ or not inspect.isfunction(n.target):
        return False
    names = list(inspect.signature(n.target).parameters)
    place = names.index("inplace") if "inplace" in names else len(n.args)
    return place < len(n.args) and bool(n.args[place])


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
