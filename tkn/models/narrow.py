"""Dense networks made narrower, and what they then are as plain data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tkn.macs import count_macs
from tkn.models.architecture import Architecture, Narrowed
from tkn.models.channels import prune_channels
from tkn.models.factory import Factory
from tkn.models.thin import thin
from tkn.models.widths import changed_widths


def thin_network(
    architecture: Architecture, wanted: float, factory: Factory | str | None = None
) -> tuple[nn.Module, Architecture]:
    """The freshly initialised network with every convolution thinner, and its architecture.

    wanted: multiply-adds for one image, or below 1 the share of the whole network's. The nearest that whole widths
    allow is taken. ValueError for a targeted network, and if the whole network has fewer, or the thinnest one more.
    """
    if architecture.targeted:
        raise ValueError(f"model.thin={wanted:g} is for dense networks: {architecture.title} has target layers")
    base, size = architecture.build(factory=factory), architecture.input_size
    whole = count_macs(base, size).total_dense
    macs = wanted_macs(wanted, whole)
    if macs >= whole:
        raise ValueError(f"model.thin={wanted:g} must be below the {whole} multiply-adds of {architecture.title}")
    least = count_macs(thin(base, size, 0), size).total_dense
    if macs < least:
        raise ValueError(
            f"model.thin={wanted:g}: the least that {architecture.title} can have is {least} multiply-adds"
        )
    model = thin(base, size, macs)
    return model, _described(architecture, "thin", macs, base, model, factory)


def pruned_network(
    architecture: Architecture, weights: Mapping[str, Tensor], wanted: float, factory: Factory | str | None = None
) -> tuple[nn.Module, Architecture]:
    """The network of `weights` without its least channels (see `prune_channels`), and its architecture.

    wanted: multiply-adds for one image, or below 1 the share of the whole network's. ValueError for a targeted network.
    """
    if architecture.targeted:
        raise ValueError(f"channels.macs={wanted:g} is for dense networks: {architecture.title} has target layers")
    base = architecture.build(factory=factory)
    base.load_state_dict(weights)
    macs = wanted_macs(wanted, count_macs(base, architecture.input_size).total_dense)
    model = prune_channels(base, architecture.input_size, macs)
    return model, _described(architecture, "channels", macs, base, model, factory)


def wanted_macs(wanted: float, whole: int) -> int:
    """The multiply-adds that are wanted of a network that has `whole`: below 1 `wanted` is a share of these."""
    return round(wanted * whole if wanted < 1 else wanted)


def _described(
    architecture: Architecture, by: str, wanted: int, base: nn.Module, model: nn.Module, factory: Factory | str | None
) -> Architecture:
    size = architecture.input_size
    narrowed = Narrowed(
        by,
        wanted,
        count_macs(model, size).total_dense,
        count_macs(base, size).total_dense,
        changed_widths(base, model),
    )
    described = replace(architecture, narrowed=narrowed)
    if not _compute_the_same(described.build(factory=factory), model, size):
        raise ValueError(f"{architecture.title} made narrower can't be made again from its widths")
    return described


@torch.no_grad()
def _compute_the_same(remade: nn.Module, model: nn.Module, input_size: tuple[int, ...]) -> bool:
    """Whether `remade` with the weights of `model` is that network: tied layers, for one, may have come apart."""
    weights = model.state_dict()
    if {name: value.shape for name, value in remade.state_dict().items()} != {n: v.shape for n, v in weights.items()}:
        return False
    remade.load_state_dict(weights)
    images = torch.rand(1, *input_size, generator=torch.Generator().manual_seed(0))
    theirs, ours = (copy.deepcopy(network).eval()(images) for network in (remade, model))
    return torch.allclose(theirs, ours, equal_nan=True)
