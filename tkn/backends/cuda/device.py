"""The GPU that kernels are started on, and how exactly it multiplies."""

from __future__ import annotations

import torch


def on(device: torch.device) -> torch.cuda.device:
    """A context in which kernels are started on `device`; the CPU, where they are interpreted, is none of the GPUs."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def tf32_allowed() -> bool:
    """Whether torch lets matrix products of float32 round their factors to TF32."""
    own, general = torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision  # type: ignore[attr-defined]
    return own == "tf32" or (own == "none" and general == "tf32")
