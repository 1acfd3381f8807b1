"""Whether two ways of computing agree, and images on which that says something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite, prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Results that differ by more than this part of the largest number are not the same; by what the products are of.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
TOLERANCE = TOLERANCES[torch.float32]
#: On so many images networks are compared: others than those on which they are captured.
_BATCH = 3


def random_images(batch: int, size: tuple[int, ...], seed: int = 0) -> Tensor:
    """Within [0, 1): [batch, *size]."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(batch, *size, generator=generator, dtype=torch.float32, device="cpu")


def random_inputs(batch: int, shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    """`random_images` of each shape, of other numbers."""
    return [random_images(batch, shape, seed + 1000 * index) for index, shape in enumerate(shapes)]


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


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Of as many tensors."""
    return max((difference(one, other) for one, other in zip(ours, theirs, strict=True)), default=0.0)


def _part(error: float, largest: float) -> float:
    if error == 0:
        return 0.0
    return error / largest if largest > 0 else torch.inf


def tells(results: Sequence[Tensor]) -> bool:
    """Whether some of a network's results [B, ...] depend on its images, and all are finite: else any two networks
    agree."""
    finite = all(bool(result.isfinite().all()) for result in results)
    return finite and any(result.dim() > 0 and bool((result != result[:1]).any()) for result in results)


def compare(
    ours: Callable[..., Sequence[Tensor]],
    theirs: Callable[..., Sequence[Tensor]],
    shapes: Sequence[tuple[int, ...]],
) -> tuple[float, bool]:
    """The largest `difference` of the results for inputs [B, *shape], and whether any of them `tells`.

    If none of them does, other inputs are tried: of both signs, large and small ones.
    """
    largest, told = 0.0, False
    for given in _inputs(shapes):
        expected = theirs(*(x.clone() for x in given))
        largest = max(largest, largest_difference(ours(*given), expected))
        told = tells(expected)
        if told:
            break
    return largest, told


def _inputs(shapes: Sequence[tuple[int, ...]]) -> Iterator[list[Tensor]]:
    plain = random_inputs(_BATCH, shapes, seed=1)
    yield plain
    for largest in (2.0, 200.0, 0.01):
        yield [largest * (2 * x - 1) for x in plain]
