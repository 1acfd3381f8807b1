"""The channels of target layers in an order in which neighbours' ROIs lie close to each other."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from tkn.plan.graph import (
    AdaptivePooling,
    Affine,
    ChannelNorm,
    Convolve,
    Graph,
    Operation,
    Pooling,
    Resize,
    Same,
    UnevenMean,
)
from tkn.plan.nonlinearity import Nonlinearity

#: About as many channels as are computed or skipped together.
_TOGETHER = 16
#: What computes the same of channels in another order.
_OF_ANY_ORDER = (Affine, ChannelNorm, Nonlinearity, Pooling, UnevenMean, AdaptivePooling, Resize, Same)


def with_neighbours(graph: Graph) -> Graph:
    """The same function of images, of other weights: where target layers' maps are only read by convolutions, their
    channels change places, so that several in a row are zero where one is."""
    operations = [node.operation for node in graph.nodes]
    for position, node in enumerate(graph.nodes):
        conv = node.operation
        if not isinstance(conv, Convolve) or conv.mask is None or len(conv.weight) <= _TOGETHER:
            continue
        readers = _readers(graph, position)
        if readers is None or conv.groups > 1:
            continue
        order = _order(conv.mask)
        operations[position] = _outputs_reordered(operations[position], order)
        for reader in readers:
            operations[reader] = _inputs_reordered(operations[reader], order)
    return graph.with_operations(operations)


def _readers(graph: Graph, position: int) -> list[int] | None:
    """The operations that read a map channel by channel, up to the convolutions; None if others read it."""
    readers: list[int] = []
    ahead = [position]
    while ahead:
        current = ahead.pop()
        if current in graph.outputs:
            return None
        for user in graph.nodes[current].users:
            operation = graph.nodes[user].operation
            if isinstance(operation, _OF_ANY_ORDER):
                ahead.append(user)
            elif not isinstance(operation, Convolve) or operation.groups > 1:
                return None
            if user not in readers:
                readers.append(user)
    return readers


def _order(mask: Tensor) -> Tensor:
    """In bands from the top down, each from left to right."""
    rows, columns = mask.any(dim=2).double(), mask.any(dim=1).double()
    y, x = (
        ((axis * torch.arange(axis.shape[1])).sum(dim=1) / axis.sum(dim=1).clamp(min=1)).numpy()
        for axis in (rows, columns)
    )
    rank = np.argsort(np.argsort(y, kind="stable"), kind="stable")
    bands = max(1, isqrt(len(mask) // _TOGETHER))
    return torch.from_numpy(np.lexsort((x, rank * bands // len(mask))))


def _outputs_reordered(conv: Operation, order: Tensor) -> Convolve:
    assert isinstance(conv, Convolve)
    attention = conv.attention
    if attention is not None:
        attention = replace(attention, loc=attention.loc[:, order], scale=attention.scale[:, order])
    bias = None if conv.bias is None else conv.bias[order]
    return replace(conv, weight=conv.weight[order], bias=bias, attention=attention)


def _inputs_reordered(operation: Operation, order: Tensor) -> Operation:
    if isinstance(operation, Convolve):
        return replace(operation, weight=operation.weight[:, order])
    if isinstance(operation, Affine | ChannelNorm):
        return replace(operation, scale=operation.scale[order], shift=operation.shift[order])
    return operation
