"""Target layers of any network: which convolutions, and in which block of the scale penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tkn.convert import targetize
from tkn.layers import roi_layers
from tkn.macs import count_macs
from tkn.models.names import Names, as_patterns, is_chosen, require_matches

#: The paper's networks have three blocks (Sec. 4.3).
_BLOCKS = 3
ALL = "all"


def target(
    model: nn.Module,
    input_size: tuple[int, ...],
    layers: Names,
    attention: Mapping[str, Any],
    blocks: Mapping[str, int] | None = None,
) -> nn.Module:
    """`model` with the convolutions that `layers` chooses as target layers, in place.

    Args:
        layers: None for every convolution of more than one pixel, "all" for every one, else names of convolutions or
            of modules around them, or patterns.
        attention: the keyword arguments of `TargetConv2d`.
        blocks: the blocks that some convolutions have by name; another gets that of the next one that has. Without,
            the layers in their order of execution are parted in thirds, so that beta acts as on the paper's networks.

    ValueError if `layers` chooses nothing, or a pattern none.
    """
    convolutions = _executed_convolutions(model, input_size)
    patterns = as_patterns(layers)
    if layers is None:
        chosen = [name for name, conv in convolutions.items() if max(conv.kernel_size) > 1]
    elif patterns == [ALL]:
        chosen = list(convolutions)
    else:
        require_matches("model.layers", patterns, convolutions, "convolutions")
        chosen = [name for name in convolutions if is_chosen(name, patterns)]
    if not chosen:
        raise ValueError(f"model.layers={layers} chooses no convolution of the network")
    numbers = _thirds(chosen) if blocks is None else _next_blocks(chosen, list(convolutions), blocks)
    return targetize(model, chosen, blocks=numbers, inplace=True, **attention)


def _executed_convolutions(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, nn.Conv2d]:
    """Plain convolutions by name, in their order of execution; those that evaluation leaves out have no maps."""
    modules = dict(model.named_modules())
    names = dict.fromkeys(row.name for row in count_macs(model, input_size).layers)
    return {name: modules[name] for name in names if type(modules[name]) is nn.Conv2d}


def _thirds(names: Sequence[str]) -> dict[str, int]:
    return {name: _BLOCKS * position // len(names) for position, name in enumerate(names)}


def _next_blocks(chosen: Sequence[str], order: Sequence[str], known: Mapping[str, int]) -> dict[str, int]:
    blocks, block = {}, max(known.values(), default=0)
    for name in reversed(order):
        block = known.get(name, block)
        blocks[name] = block
    return {name: blocks[name] for name in chosen}


def blocks_of(model: nn.Module) -> dict[str, int]:
    """The block of every target layer of `model`, by name."""
    return {name: layer.block for name, layer in roi_layers(model).items()}
