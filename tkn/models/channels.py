"""Channel pruning, by the library Torch-Pruning: a trained network without the channels that matter least."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec

import torch
from torch import nn

from tkn.app.messages import first_line
from tkn.macs import count_macs
from tkn.models.stn import SpatialTransformer

#: No layer loses more than this part of its channels.
_MOST = 0.95
#: The search ends when the multiply-adds are so near.
_NEAR = 0.001


def require_library() -> None:
    """ValueError if Torch-Pruning is not installed."""
    if find_spec("torch_pruning") is None:
        raise ValueError("channels.checkpoint needs the extra 'channels'")


def prune_channels(model: nn.Module, input_size: tuple[int, ...], macs: int) -> nn.Module:
    """A copy of a trained dense `model` without its least channels, as near to `macs` as whole channels allow.

    Which channels matter is said by the l2 norm of all weights that go with one (DepGraph's GroupMagnitudeImportance,
    Fang et al. 2023), compared over the whole network; the outputs stay. ValueError if the network can't be pruned, or
    not to so many.
    """
    dense = count_macs(model, input_size).total_dense
    if not 0 < macs < dense:
        raise ValueError(f"channels.macs={macs} must lie between 0 and {dense}, those of the whole network")
    low, high = 0.0, _MOST
    found: dict[float, nn.Module] = {}

    def cost(share: float) -> int:
        found[share] = _without(model, input_size, share)
        return count_macs(found[share], input_size).total_dense

    try:
        # As many halvings as part the channels of any network one from another.
        costs = {share: cost(share) for share in (low, high)}
        for _ in range(16):
            if min(abs(value - macs) for value in costs.values()) <= _NEAR * macs:
                break
            middle = (low + high) / 2
            costs[middle] = cost(middle)
            low, high = (middle, high) if costs[middle] > macs else (low, middle)
    except Exception as error:  # the library's and the network's own kinds
        raise ValueError(f"{type(model).__name__} can't be pruned: {first_line(error)}") from error
    if min(costs.values()) > macs * (1 + _NEAR):
        raise ValueError(f"channels.macs={macs}: the least that pruning comes to is {min(costs.values())}")
    nearest = min(costs, key=lambda share: abs(costs[share] - macs))
    return found[nearest].train(model.training)


def _without(model: nn.Module, input_size: tuple[int, ...], share: float) -> nn.Module:
    """A copy of `model` without this share of all its channels."""
    import torch_pruning

    pruned = copy.deepcopy(model).eval()
    fixed = [module.affine for module in pruned.modules() if isinstance(module, SpatialTransformer)]
    *_, classifier = (module for module in pruned.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it doesn't prune
        torch_pruning.pruner.BasePruner(
            pruned,
            torch.zeros(1, *input_size),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            max_pruning_ratio=_MOST,
            global_pruning=True,
            ignored_layers=[classifier, *fixed],
        ).step()
    return pruned
