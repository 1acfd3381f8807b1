"""Targeted Kernel Networks: convolutions that learn the region of interest they work in (Chitta, 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tkn import moved  # noqa: F401  # old import paths
from tkn.adaptive import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d, ImageRois
from tkn.budget import Budget
from tkn.convert import targetize
from tkn.decay import parameter_groups
from tkn.fixed_rois import fix_rois_
from tkn.layers import (
    AttentiveRegularization1d,
    AttentiveRegularization2d,
    AttentiveRegularization3d,
    TargetConv1d,
    TargetConv2d,
    TargetConv3d,
)
from tkn.macs import count_macs
from tkn.models import build_model
from tkn.ops.tuning import tune
from tkn.penalty import kernel_costs, scale_penalty
from tkn.plan.plan import accelerate, load_plan
from tkn.projection import project_
from tkn.resolution import at_resolution
from tkn.several import MixtureConv1d, MixtureConv2d, MixtureConv3d, PartsConv1d, PartsConv2d, PartsConv3d
from tkn.sliding import slide

if TYPE_CHECKING:
    from tkn.training.records.checkpoint import load_model
    from tkn.training.run import run

__all__ = [
    "AdaptiveConv1d",
    "AdaptiveConv2d",
    "AdaptiveConv3d",
    "AttentiveRegularization1d",
    "AttentiveRegularization2d",
    "AttentiveRegularization3d",
    "Budget",
    "ImageRois",
    "MixtureConv1d",
    "MixtureConv2d",
    "MixtureConv3d",
    "PartsConv1d",
    "PartsConv2d",
    "PartsConv3d",
    "TargetConv1d",
    "TargetConv2d",
    "TargetConv3d",
    "accelerate",
    "at_resolution",
    "build_model",
    "count_macs",
    "fix_rois_",
    "kernel_costs",
    "load_model",
    "load_plan",
    "parameter_groups",
    "project_",
    "run",
    "scale_penalty",
    "slide",
    "targetize",
    "tune",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; the layers alone must not.
    if name == "run":
        from tkn.training.run import run

        return run
    if name == "load_model":
        from tkn.training.records.checkpoint import load_model

        return load_model
    raise AttributeError(f"module 'tkn' has no attribute {name!r}")
