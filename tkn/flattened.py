"""Which maps the input of a fully connected layer was flattened from, seen operation by operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

#: The size (C, ...) of a map of one image.
MapSize = tuple[int, ...]

_aten = torch.ops.aten
_VIEWS = {_aten.view, _aten._unsafe_view, _aten.reshape, _aten._reshape_alias}
#: What a fully connected layer computes by: its outputs are no pixels.
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.linear}


class Flattened(TorchDispatchMode):
    """Within the context follows the maps [1, C, ...] of one image that are flattened to [1, features], through
    operations by element and concatenations, up to the next matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self._maps = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() == 2 and func.overloadpacket not in _PRODUCTS:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if maps := self._flattened(func.overloadpacket, given, result):
                self._maps[result] = maps
        return result

    def _flattened(self, operation: Any, given: Sequence[Tensor], result: Tensor) -> tuple[MapSize, ...]:
        if operation is _aten.cat:
            return tuple(size for each in given for size in self.maps_of(each))
        for each in given:
            if each.numel() != result.numel():
                continue
            if operation in _VIEWS and each.dim() > 2 and len(each) == len(result) == 1:
                return (tuple(each.shape[1:]),)
            if maps := self.maps_of(each):
                return maps
        return ()

    def maps_of(self, features: Tensor) -> tuple[MapSize, ...]:
        """The maps whose pixels are in `features` [1, n], in their order; none if these are no map's pixels."""
        maps: tuple[MapSize, ...] = self._maps.get(features, ())
        return maps
