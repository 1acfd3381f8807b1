"""Whether two ways of computing agree, and images on which that says something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import isfinite, prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Results that differ by more than this part of the largest number are not the same; by what the products are of.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
TOLERANCE = TOLERANCES[torch.float32]
#: Numbers of images on which networks are compared: others than those on which they are captured.
_BATCHES = (2, 7)


def random_images(batch: int, size: tuple[int, ...], seed: int = 0) -> Tensor:
    """Within [0, 1): [batch, *size]."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(batch, *size, generator=generator, dtype=torch.float32, device="cpu")


def fixed_images(batch: int, size: tuple[int, ...]) -> Tensor:
    """Numbers within [0, 1), the same on every machine and in every version: [batch, *size]."""
    count = batch * prod(size)
    # Mixed as whole numbers, of which the upper sixteen bits are fractions without rounding.
    mixed = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B1) % np.uint64(2**32)
    mixed = (mixed ^ (mixed >> np.uint64(15))) * np.uint64(0x85EBCA77) % np.uint64(2**32)
    fractions = (mixed >> np.uint64(16)).astype(np.float32) / np.float32(2**16)
    return torch.from_numpy(fractions.reshape(batch, *size))


class Error(NamedTuple):
    """How far results are from those of torch in float32, as parts of the largest number of these."""

    largest: float
    mean: float

    def __str__(self) -> str:
        return f"{self.largest:.1e} of the largest output at most, {self.mean:.1e} on average"


def error_of(ours: Tensor, theirs: Tensor) -> Error:
    """Of finite results."""
    apart = (ours.double() - theirs.double()).abs()
    largest = float(theirs.double().abs().max())
    return Error(_part(float(apart.max()), largest), _part(float(apart.mean()), largest))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a part of the largest finite number of `theirs`.

    Infinite if the shapes or types differ, if NaN and infinities are not in the same places, or if some number is not
    zero where all should be.
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return torch.inf
    if theirs.numel() == 0:
        return 0.0
    if theirs.dtype != torch.float32:
        ours, theirs = ours.double(), theirs.double()
    error = float((ours - theirs).abs().max())
    if isfinite(error):
        return _part(error, float(theirs.abs().max()))
    finite = theirs.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return torch.inf
    if not torch.equal(ours[~finite].nan_to_num(0.5), theirs[~finite].nan_to_num(0.5)):
        return torch.inf
    if not finite.any():
        return 0.0
    ours, theirs = ours[finite], theirs[finite]
    return _part(float((ours - theirs).abs().max()), float(theirs.abs().max()))


def _part(error: float, largest: float) -> float:
    if error == 0:
        return 0.0
    return error / largest if largest > 0 else torch.inf


def tells(result: Tensor) -> bool:
    """Whether a network's result depends on its images [B, ...], and is finite: else any two networks agree."""
    return bool(result.isfinite().all()) and len(result) > 1 and bool((result != result[:1]).any())


def compare(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], size: tuple[int, ...]
) -> tuple[float, bool]:
    """The largest `difference` on images of `size`, and whether any of them `tells`.

    If none of them does, other images are tried: of both signs, large and small ones.
    """
    largest, told = 0.0, False
    for images in _images(size):
        for batch in _BATCHES:
            x = images(batch)
            expected = theirs(x.clone())
            largest = max(largest, difference(ours(x), expected))
            told = told or tells(expected)
        if told:
            break
    return largest, told


def _images(size: tuple[int, ...]) -> Iterator[Callable[[int], Tensor]]:
    def both_signs(largest: float, batch: int) -> Tensor:
        return largest * (2 * random_images(batch, size, seed=batch) - 1)

    yield lambda batch: random_images(batch, size, seed=batch)
    for largest in (2.0, 200.0, 0.01):
        yield partial(both_signs, largest)
