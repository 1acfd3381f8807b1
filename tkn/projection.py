"""The projection of a whole model, which keeps every ROI valid (Sec. 3.5)."""

from __future__ import annotations

from torch import nn

from tkn.layers import roi_layers


def project_(model: nn.Module) -> None:
    """Clip loc and scale of every layer with ROIs in place, for maps of the size that its last forward pass made.

    Call it after each step of the optimiser. A layer that has not run yet is left as it is. ValueError if none has:
    passes that torch compiles or traces are not remembered, so call the model itself or `tkn.count_macs` once.
    """
    layers = roi_layers(model).values()
    if layers and all(layer.map_size is None for layer in layers):
        raise ValueError(
            "the maps' sizes are not known, for no layer with ROIs has run outside of torch.compile and DataParallel: "
            "run the model once, or tkn.count_macs(model, input_size), before tkn.project_(model)"
        )
    for layer in layers:
        if layer.map_size is not None:
            layer.project_(layer.map_size)
