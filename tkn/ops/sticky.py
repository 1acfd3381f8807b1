"""Choices that are kept: a small layer takes less time than choosing its engine anew."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from tkn.kept import Kept, content
from tkn.ops import tuned
from tkn.ops.segments import Call, Segment, backends_of, is_observed
from tkn.spec import Target

#: A choice counts as one byte: so many are kept.
_choices = Kept(4096)

Choose = Callable[[Tensor, Sequence[Target], str, Call], list[Segment]]


def sticky(x: Tensor, targets: Sequence[Target], engine: str, call: Call, choose: Choose) -> list[Segment]:
    """What `choose` said at first of such layers in this state on such an input.

    Where what autograd saves is handed on, as in a checkpointed region, that holds even if kernels were built in
    between: a pass is computed once more there and must save the same tensors. Elsewhere a choice is kept once kernels
    could be built.
    """
    handed_on = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    lasts = engine.startswith("auto") and call.may_build and not is_observed()
    if x.device.type != "cpu" or not (handed_on or lasts):
        return choose(x, targets, engine, call)
    key = (tuple(x.shape), x.dtype, engine, call, torch.get_num_threads(), tuned.count(), *map(_state, targets))
    backends = _choices.get(key, lambda: backends_of(choose(x, targets, engine, call)), _one)
    made, first = [], 0
    for count, backend in backends:
        made.append(Segment(tuple(targets[first : first + count]), backend))
        first += count
    return made


def forget() -> None:
    """Choose anew from now on: what a choice depends on was changed from outside."""
    _choices.clear()


def _state(target: Target) -> tuple[Hashable, ...]:
    """What a choice depends on of a layer."""
    weight, bias = target.weight, target.bias
    layout = weight.shape, weight.dtype, weight.is_contiguous(), None if bias is None else bias.dtype
    return target.spec, *layout, *content(target.loc, target.scale)


def _one(_value: object) -> int:
    return 1
