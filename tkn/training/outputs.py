"""A regression begins at its targets' mean: else the first epochs go to learning that alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tkn.evaluating import evaluating, zeros_for
from tkn.macs import count_macs


def start_at_(
    model: nn.Module, input_size: tuple[int, ...], targets: Tensor, learned: frozenset[str] = frozenset()
) -> None:
    """Let the outputs begin where `targets` [N, outputs] are, and spread as these: in place.

    The layer which runs last gets their mean as its bias, and its weights are multiplied by their deviation, if it is
    fully connected or a 1x1 convolution with a bias, and if its bias is added to the outputs; any other network is left
    as it is, and so is a layer of which a parameter is among the names `learned`. Without that, Adam's steps take
    epochs to come from weights of a unit's size to those that tell numbers of ten times the size.
    """
    mean, deviation = targets.float().mean(dim=0), targets.float().std(dim=0, correction=0)
    last = count_macs(model, input_size).layers[-1].name
    layer = model.get_submodule(last)
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.bias is None or layer.bias.shape != mean.shape:
        return
    if {f"{last}.bias", f"{last}.weight"} & learned or (isinstance(layer, nn.Conv2d) and set(layer.kernel_size) != {1}):
        return
    with torch.no_grad():
        before, outputs = layer.bias.clone(), _outputs(model, input_size)
        layer.bias.copy_(mean)
        shift = _outputs(model, input_size) - outputs
        if not torch.allclose(shift, (mean - before).expand_as(shift), rtol=1e-3, atol=1e-3 * float(mean.abs().max())):
            layer.bias.copy_(before)  # something comes after it
            return
        # Equal targets say nothing of how far the outputs should spread.
        factor = torch.where(deviation > 0, deviation, 1.0)
        layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.dim() - 1)))


def _outputs(model: nn.Module, input_size: tuple[int, ...]) -> Tensor:
    """[1, outputs], of an image of zeros."""
    with evaluating(model):
        outputs: Tensor = model(zeros_for(model, input_size))
    return outputs
