"""Parts of a network that do not learn."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from tkn.models.names import is_chosen, require_matches


def freeze_(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters of what `patterns` choose, names of modules or parameters, keep their values.

    ValueError if a pattern chooses none, or if nothing is left to learn.
    """
    parameters = dict(model.named_parameters())
    require_matches("model.freeze", patterns, parameters, "parameters")
    for name, parameter in parameters.items():
        if is_chosen(name, patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"model.freeze={list(patterns)} leaves nothing to learn")


def frozen_norms(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The normalisations among what `patterns` choose: their statistics must keep their values too."""
    return [
        module for name, module in model.named_modules() if isinstance(module, _NormBase) and is_chosen(name, patterns)
    ]
