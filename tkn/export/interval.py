"""Errors measured on some images, and how far off they may be for others like these."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from torch import Tensor

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean over images, and its interval of 95 %."""

    value: float
    low: float
    high: float


def of_share(wrong: Tensor) -> Estimate:
    """The percentage of True among bool [N], with Wilson's interval."""
    count, share = len(wrong), float(wrong.double().mean())
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    # Rounding must not leave the share itself out.
    return Estimate(100 * share, 100 * max(0.0, min(share, middle - half)), 100 * min(1.0, max(share, middle + half)))


def of_mean(values: Tensor) -> Estimate:
    """The mean of float [N], with the normal distribution's interval."""
    mean = float(values.double().mean())
    half = _Z * float(values.double().std()) / sqrt(len(values)) if len(values) > 1 else float("inf")
    return Estimate(mean, mean - half, mean + half)
