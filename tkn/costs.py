"""What a layer is estimated to take: seconds as a sum of what is counted of it, each times a constant.

The constants (costs.json) were fitted to random layers on one machine by `python -m tkn.bench.costs`; another machine
is held to be faster or slower as a whole, by factors measured when its kernels are compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from math import ceil, prod
from pathlib import Path

import torch

from tkn.work import Work

#: Of seconds by engine and kind of numbers: this machine's, of those of the machine of costs.json.
Factors = Mapping[str, Mapping[str, float]]


def kind_of(work: Work) -> str:
    """Which constants hold: those of single or half precision, with convolutions in the frequency domain or without."""
    half = work.dtype in (torch.bfloat16, torch.float16)
    return ("half" if half else "single") + (" fourier" if work.fourier and work.training else "")


def dense_counts(work: Work) -> list[float]:
    """What the time by torch depends on: the calls, multiply-adds (slower with few channels), numbers moved; and the
    same of the gradients."""
    inputs, outputs = work.channels / work.groups, work.outputs / work.groups
    weights = prod(work.kernel) * work.outputs * inputs
    pixels, pooled = prod(work.output), 1 - 1 / prod(work.pool or (1,))
    macs = work.macs / work.threads
    read = work.batch * work.channels * prod(work.size) / work.threads
    written = work.batch * work.outputs * pixels / work.threads
    forward = [1, macs, macs / inputs, macs / outputs, macs / (inputs * outputs), read, written, written * pooled]
    wide = prod(work.kernel) > 1
    gradients = [macs, macs / inputs, macs / outputs, weights, read, written, 1, wide * macs / (inputs * outputs)]
    of_x = [macs, macs / inputs, macs / outputs]
    return forward + _if(work.training, [*gradients, work.outputs * pixels]) + _if(work.training and work.needs_x, of_x)


def roi_counts(work: Work) -> list[float]:
    """What the time inside the ROIs depends on: the calls, multiply-adds left, numbers packed, weighed and unpacked,
    taps looked up; and the same of the gradients."""
    inputs, outputs = work.channels / work.groups, work.outputs / work.groups
    lanes = 16 if work.batch <= 16 else 32 if work.batch <= 64 else 64
    tiles = ceil(work.batch / lanes)
    images = tiles * lanes
    pixels, taps = prod(work.output), prod(work.kernel)
    macs = work.macs / work.batch * images * work.share * work.live / work.threads
    packed = images * work.channels * prod(work.size) * work.live / work.threads
    inside = images * work.outputs * pixels * work.share / work.threads
    unpacked = work.batch * work.outputs * pixels / prod(work.pool or (1,)) / work.threads
    looked_up = tiles * work.outputs * pixels * work.share * taps / work.threads
    weights = taps * work.outputs * inputs
    few = macs / max(1.0, inputs * work.live)
    forward = [1, macs, few, packed, inside, unpacked, looked_up, weights]
    gradients = [macs, few, packed, inside, unpacked, weights, 1, work.outputs * pixels, looked_up]
    of_x = [macs, macs / max(1.0, outputs * work.share), packed]
    return forward + _if(work.training, gradients) + _if(work.training and work.needs_x, of_x)


def _if(holds: bool, counts: list[float]) -> list[float]:
    return [holds * count for count in counts]


@cache
def constants() -> dict[str, dict[str, list[float]]]:
    """The constants by engine and kind."""
    return json.loads(Path(__file__).with_name("costs.json").read_text(encoding="utf-8"))


def seconds(engine: str, work: Work, factors: Factors) -> float:
    """What `engine`, "dense" or "roi", is estimated to take."""
    counts = dense_counts(work) if engine == "dense" else roi_counts(work)
    kind = kind_of(work)
    factor = factors.get(engine, {}).get(kind, 1.0)
    return factor * _sum(constants()[engine][kind], counts) * (2 if work.dtype == torch.float64 else 1)


def _sum(constants: Sequence[float], counts: Sequence[float]) -> float:
    return sum(constant * count for constant, count in zip(constants, counts, strict=True))
