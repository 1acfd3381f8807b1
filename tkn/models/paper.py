"""The paper's networks, initialised as it says (Sec. 4.2, 4.3, Table 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tkn.models.cnn6 import cnn6
from tkn.models.common import Convolutions, initialise
from tkn.models.densenet import dn10, dn40
from tkn.models.names import Names
from tkn.models.stn import SpatialTransformer, stn
from tkn.models.targeting import blocks_of, target

#: name -> (builder, targeted)
PAPER: dict[str, tuple[Callable[..., nn.Sequential], bool]] = {
    "cnn6": (cnn6, False),
    "tkn6": (cnn6, True),
    "dn10": (dn10, False),
    "tdn10": (dn10, True),
    "dn40": (dn40, False),
    "tdn40": (dn40, True),
    "stn": (stn, False),
    "tstn": (stn, True),
}
#: Targeted networks by the dense ones that they are made of.
BASE = {name: builder.__name__ for name, (builder, targeted) in PAPER.items() if targeted}


def dense_network(
    name: str, input_size: tuple[int, int, int], num_outputs: int, *, dropout: float | None = None
) -> nn.Module:
    """cnn6, dn10, dn40 or stn; `dropout`: instead of the network's own probability."""
    return _network(name, input_size, num_outputs, Convolutions(targeted=False), dropout)


def targeted_network(
    name: str,
    input_size: tuple[int, int, int],
    num_outputs: int,
    attention: Mapping[str, Any],
    *,
    dropout: float | None = None,
    layers: Names = None,
) -> nn.Module:
    """tkn6, tdn10, tdn40 or tstn; `layers`: other target layers than the paper's (see `target`).

    attention: the keyword arguments of `TargetConv2d`.
    """
    if layers is None:
        return _network(name, input_size, num_outputs, Convolutions(targeted=True, attention=dict(attention)), dropout)
    own = _network(name, input_size, num_outputs, Convolutions(targeted=True), dropout)
    dense = _network(name, input_size, num_outputs, Convolutions(targeted=False), dropout)
    return target(dense, input_size, layers, attention, blocks_of(own))


def _network(
    name: str, input_size: tuple[int, int, int], num_outputs: int, convolutions: Convolutions, dropout: float | None
) -> nn.Module:
    builder, _ = PAPER[name]
    options = {} if dropout is None else {"dropout": dropout}
    model = builder(name, input_size, num_outputs, convolutions, **options)
    initialise_all(model)
    return model


def initialise_all(model: nn.Module) -> None:
    """He et al.'s initialisation (see `initialise`), spatial transforms to the identity."""
    initialise(model)
    for module in model.modules():
        if isinstance(module, SpatialTransformer):
            module.reset_transform()
