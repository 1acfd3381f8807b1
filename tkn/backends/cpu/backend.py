"""The CPU's ROI backend as the operators see it: what it can't compute, and its chains of layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tkn import costs
from tkn.backends.cpu import build
from tkn.backends.cpu.chain import Chain
from tkn.backends.cpu.kernels import Tiles
from tkn.backends.cpu.rows import Rows
from tkn.backends.cpu.stage import Stage
from tkn.costs import Factors
from tkn.kept import Kept
from tkn.roi import roi_mask
from tkn.spec import Target
from tkn.windows import kept_bounds
from tkn.work import Work

_HALVES = (torch.bfloat16, torch.float16)
#: Lists of layers, for the states of their ROIs and the batches that came last, bytes.
_stages = Kept(512 * 2**20)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type of rows and sums for inputs of `dtype`: float32 for halves."""
    return torch.float32 if dtype in _HALVES else dtype


def reason_not(x: Tensor, targets: Sequence[Target], *, autocast: bool) -> str | None:
    """Why the backend can't compute these layers of x, None if it can. Under autocast x may be of halves."""
    expected = computed_in(x.dtype) if autocast else x.dtype
    for tensor in (x, *(t for target in targets for t in target.tensors)):
        if tensor.device.type != "cpu":
            return f"the ROI engine works on the CPU, not on {tensor.device}"
    if any(target.per_image for target in targets):
        return "the ROI engine knows no ROIs of each image"
    if x.dtype not in (torch.float32, torch.float64, *_HALVES):
        return f"the ROI engine computes floating point numbers, not {x.dtype}"
    for target in targets:
        for parameter in (target.weight, target.bias):
            if parameter is not None and parameter.dtype != expected:
                return f"the ROI engine needs parameters of the input's type, {expected}, not {parameter.dtype}"
    return None


def seconds(engine: str, work: Work) -> float:
    """What `engine` is estimated to take on this machine."""
    return costs.seconds(engine, work, factors())


def factors() -> Factors:
    """What was measured when the kernels were compiled; nothing where the machine was too busy for it."""
    return _read_factors(build.factors_file())


@cache
def _read_factors(path: Path) -> Factors:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {engine: {kind: float(factor) for kind, factor in kinds.items()} for engine, kinds in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def available(device: torch.device, dtype: torch.dtype, *, may_build: bool) -> bool:
    """Whether there are kernels for inputs of `dtype`; `may_build`: compile and check them if that was not done yet."""
    del device  # there is one CPU
    return build.available(computed_in(dtype), may_build=may_build)


def stage(
    shape: tuple[int, ...], dtype: torch.dtype, targets: Sequence[Target], *, bfloat16: bool, lanes: int | None = None
) -> Stage:
    """The lists of the last of `targets`, which begin at a batch of `shape` [B, C, *size]; kept while the ROIs stay.

    `dtype`: of rows and sums; `bfloat16`: round the factors of products; `lanes`: images of a tile, by default what the
    number of threads suggests.
    """
    tiles = Tiles.of(shape[0], dtype) if lanes is None else Tiles(shape[0], lanes)
    layers = []
    size = shape[2:]
    for target in targets:
        bounds = kept_bounds(target, target.output_size(size))
        layers.append((target.spec, target.weight.shape, None if bounds is None else bounds.key))
        size = target.result_size(size)
    key = (shape, dtype, bfloat16, tiles, tuple(layers))

    def make() -> Stage:
        if len(targets) == 1:
            source = Rows.full(shape[1], shape[2:])
        else:
            source = stage(shape, dtype, targets[:-1], bfloat16=bfloat16, lanes=tiles.lanes).output
        return _made(source, targets[-1], tiles, dtype, bfloat16)

    return _stages.get(key, make, Stage.nbytes)


def live(shape: tuple[int, ...], dtype: torch.dtype, targets: Sequence[Target], result: torch.dtype) -> float:
    """The share of the last layer's outputs, pooled, that have rows; the arguments are those of `chain`."""
    rows = stage(shape, computed_in(dtype), targets, bfloat16=result == torch.bfloat16).output
    return rows.live / (rows.channels * rows.pixels)


def chain(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    targets: Sequence[Target],
    result: torch.dtype,
    lanes: int | None = None,
) -> Chain:
    """`targets` on inputs of `shape` [B, C, *size] and `dtype`, with a result of the type `result`: if that is
    bfloat16, in products of it where the machine has them."""
    rows, bfloat16 = computed_in(dtype), result == torch.bfloat16
    stages = tuple(
        stage(shape, rows, targets[: count + 1], bfloat16=bfloat16, lanes=lanes) for count in range(len(targets))
    )
    return Chain(tuple(targets), stages, result, targets[-1].channels_last)


def _made(source: Rows, target: Target, tiles: Tiles, dtype: torch.dtype, bfloat16: bool) -> Stage:
    geometry = target.spec.geometry(source.size, target.kernel)
    size, outputs = geometry.output_size, len(target.weight)
    bounds = kept_bounds(target, size)
    mask = np.ones((outputs, *size), dtype=bool) if bounds is None else roi_mask(size, bounds.rois).numpy()
    return Stage(source, mask, geometry, target.spec.groups, target.spec.relu, target.spec.pool, tiles, dtype, bfloat16)
