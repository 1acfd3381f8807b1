"""Reading checkpoints with clear errors before anything is built on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def read_checkpoint(path: str | Path, identity: dict[str, Any]) -> dict[str, Any]:
    """A run's checkpoint, which must be one of a model with the same `identity` (model, data, sizes).

    FileNotFoundError if it is not there, ValueError if it is damaged, foreign or of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={path} is not a file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(
            f"checkpoint={path} is damaged or not a checkpoint: {str(error).splitlines()[0][:200]}"
        ) from error
    if not isinstance(checkpoint, dict) or "tkn" not in checkpoint:
        raise ValueError(f"checkpoint={path} was not written by tkn-run")
    theirs = checkpoint["tkn"]
    for key, ours in identity.items():
        if theirs.get(key) != ours:
            raise ValueError(f"checkpoint={path} is of {key}={theirs.get(key)}, but this run is of {key}={ours}")
    return checkpoint


def load_weights(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put a checkpoint's weights into the model that it was made of."""
    prefix = "model."
    weights = {
        name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)
    }
    model.load_state_dict(weights)
