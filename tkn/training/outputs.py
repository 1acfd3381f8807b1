"""A regression begins at its targets' mean: else the first epochs go to learning that alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tkn.evaluating import evaluating, zeros_for
from tkn.macs import count_macs


def start_at_(
    model: nn.Module, input_size: tuple[int, ...], mean: Tensor, learned: frozenset[str] = frozenset()
) -> None:
    """Let the layer that makes the outputs have the bias `mean` [outputs], in place.

    That is the layer which runs last, if it is fully connected or a 1x1 convolution with a bias, and if its bias is
    added to the outputs; any other network is left as it is, and so is a bias among `learned` names of parameters.
    """
    last = count_macs(model, input_size).layers[-1].name
    layer = model.get_submodule(last)
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.bias is None or layer.bias.shape != mean.shape:
        return
    if f"{last}.bias" in learned or (isinstance(layer, nn.Conv2d) and set(layer.kernel_size) != {1}):
        return
    with torch.no_grad():
        before, outputs = layer.bias.clone(), _outputs(model, input_size)
        layer.bias.copy_(mean)
        shift = _outputs(model, input_size) - outputs
        if not torch.allclose(shift, (mean - before).expand_as(shift), rtol=1e-3, atol=1e-3 * float(mean.abs().max())):
            layer.bias.copy_(before)  # something comes after it


def _outputs(model: nn.Module, input_size: tuple[int, ...]) -> Tensor:
    """[1, outputs], of an image of zeros."""
    with evaluating(model):
        outputs: Tensor = model(zeros_for(model, input_size))
    return outputs
