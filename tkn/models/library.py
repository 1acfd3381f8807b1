"""Networks of torchvision and timm by their names there. Both take seconds to import: only where one is asked for."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from tkn.app.messages import message, unknown

#: Some have further outputs, for training; they also scale their images anew if they are made with weights.
_WITH_FURTHER_OUTPUTS = ("googlenet", "inception_v3")


def check_torchvision(network: str) -> None:
    """ValueError with the nearest name if torchvision has no such classification network."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if network not in names:
        raise ValueError(unknown("model.network of torchvision", network, names))


def torchvision_network(_input_size: tuple[int, int, int], num_outputs: int, *, network: str) -> nn.Module:
    """The dense network with torchvision's own initialisation, for images of three channels."""
    return _torchvision(network, num_classes=num_outputs)


def torchvision_weights(_input_size: tuple[int, int, int], _num_outputs: int, *, network: str) -> dict[str, Tensor]:
    """What torchvision calls the network's default weights, downloaded where they are not kept yet.

    ValueError for a network that with them normalises its images otherwise (`transform_input`), and without them not.
    """
    if network in _WITH_FURTHER_OUTPUTS:
        raise ValueError(
            f"model.weights=DEFAULT of {network} expects images in another range than others': choose one of these"
        )
    try:
        return _torchvision(network, weights="DEFAULT", progress=False).state_dict()
    except (OSError, ValueError) as error:  # a network without weights, no connection, a damaged file
        raise ValueError(f"model.weights=DEFAULT of {network} can't be had: {message(error)}") from error


def _torchvision(network: str, **options: Any) -> nn.Module:
    import torchvision

    if network in _WITH_FURTHER_OUTPUTS:
        options["aux_logits"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not initialised as they will be
        model: nn.Module = torchvision.models.get_model(network, **options)
    return model


def check_timm(network: str) -> None:
    """ValueError if timm is not installed, or, with the nearest name, if it has no such network."""
    if find_spec("timm") is None:
        raise ValueError("model=timm needs the extra 'timm'")
    import timm

    # Only timm's own: other names would be looked up on a hub.
    names = timm.list_models()
    if network not in names:
        raise ValueError(unknown("model.network of timm", network, names))


def timm_network(
    input_size: tuple[int, int, int], num_outputs: int, *, network: str, dropout: float | None = None
) -> nn.Module:
    """The dense network with timm's own initialisation; `dropout` is timm's drop_rate."""
    return _timm(network, input_size, num_classes=num_outputs, drop_rate=dropout)


def timm_weights(
    input_size: tuple[int, int, int],
    _num_outputs: int,
    *,
    network: str,
    dropout: float | None = None,  # noqa: ARG001
) -> dict[str, Tensor]:
    """timm's pretrained weights, downloaded where they are not kept yet, for images of so many channels."""
    try:
        return _timm(network, input_size, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"model.weights=DEFAULT of {network} can't be had: {message(error)}") from error


def _timm(network: str, input_size: tuple[int, int, int], **options: Any) -> nn.Module:
    import timm

    given = {key: value for key, value in options.items() if value is not None}
    model: nn.Module = timm.create_model(network, in_chans=input_size[0], **given)
    return model
