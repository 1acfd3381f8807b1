"""What a layer's computing time depends on: what a choice between engines compares, and keeps measurements under."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Work:
    """One target layer on a batch.

    `size`, `output`: of its input's and its convolution's maps. `dtype`: in which numbers are multiplied: float32,
    float64 or, under autocast or of such a network, a half. `share`: of the output's pixels inside the ROIs, `live`: of
    the input's numbers that may not be zero. `training`: with the gradients of its parameters, `needs_x`: and of its
    input. `fourier`: densely it may be computed in the frequency domain. `device`: a GPU's name, else its kind.
    """

    batch: int
    channels: int
    outputs: int
    groups: int
    size: tuple[int, ...]
    output: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    dtype: torch.dtype
    share: float
    live: float
    relu: bool
    pool: tuple[int, ...] | None
    training: bool
    needs_x: bool
    channels_last: bool
    fourier: bool
    threads: int
    device: str = "cpu"

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense convolution of the batch."""
        taps = pixels = 1
        for length, of_output in zip(self.kernel, self.output, strict=True):
            taps, pixels = taps * length, pixels * of_output
        return self.batch * pixels * taps * self.outputs * self.channels // self.groups
