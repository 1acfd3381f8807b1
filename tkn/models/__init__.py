"""The paper's networks by name: plain torch, no training code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tkn.app.messages import unknown
from tkn.layers import MinSize
from tkn.models.cnn6 import cnn6
from tkn.models.common import Convolutions, initialise
from tkn.models.densenet import dn10, dn40
from tkn.models.stn import SpatialTransformer, stn
from tkn.ops.engines import Engine

#: name -> (builder, targeted)
_MODELS: dict[str, tuple[Callable[..., nn.Sequential], bool]] = {
    "cnn6": (cnn6, False),
    "tkn6": (cnn6, True),
    "dn10": (dn10, False),
    "tdn10": (dn10, True),
    "dn40": (dn40, False),
    "tdn40": (dn40, True),
    "stn": (stn, False),
    "tstn": (stn, True),
}

MODEL_NAMES = tuple(_MODELS)
#: Targeted networks by the dense ones that they are made of.
BASE = {name: builder.__name__ for name, (builder, targeted) in _MODELS.items() if targeted}


def build_model(
    name: str,
    input_size: tuple[int, int, int],
    num_outputs: int,
    *,
    dropout: float | None = None,
    attention: str = "cauchy",
    scale_unit: float = 0.5,
    min_size: MinSize = 3,
    clip: bool = True,
    engine: Engine = "auto",
) -> nn.Module:
    """One of the paper's networks, initialised from torch's random state (Sec. 4.2, 4.3, Table 1).

    Args:
        name: cnn6, dn10, dn40, stn, or their targeted versions tkn6, tdn10, tdn40, tstn.
        input_size: (C, H, W).
        num_outputs: classes, or 1 for regression.
        dropout: instead of the network's own probability.
        attention, scale_unit, min_size, clip, engine: as in `TargetConv2d`, for targeted networks.

    Returns a module [B, C, H, W] -> [B, num_outputs], whose ROIs are whole maps. ValueError for an unknown name, an
    impossible argument or an image size that the network can't take.
    """
    if name not in _MODELS:
        raise ValueError(unknown("model", name, _MODELS))
    if len(input_size) != 3:
        raise ValueError(f"input_size={tuple(input_size)} must be (channels, height, width)")
    if num_outputs < 1:
        raise ValueError(f"num_outputs={num_outputs} must be at least 1")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must lie within [0, 1)")
    builder, targeted = _MODELS[name]
    options = {} if dropout is None else {"dropout": dropout}
    arguments: dict[str, Any] = {
        "attention": attention,
        "scale_unit": scale_unit,
        "min_size": min_size,
        "clip": clip,
        "engine": engine,
    }
    model = builder(name, input_size, num_outputs, Convolutions(targeted, arguments), **options)
    initialise(model)
    for module in model.modules():
        if isinstance(module, SpatialTransformer):
            module.reset_transform()
    return model
