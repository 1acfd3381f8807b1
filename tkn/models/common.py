"""What the paper's networks share: their convolutions, plain or targeted, and their initialisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tkn.kinds import PLAIN, target_layer
from tkn.layers import RoiLayer


@dataclass(frozen=True)
class Convolutions:
    """Makes a network's size-keeping, bias-free convolutions (Sec. 3.5); the ones that may be targeted are, or not.

    `attention`: the keyword arguments of `TargetConv2d` (attention, scale_unit, min_size, clip, engine), and those of
    `target_layer` (windows, combine, adaptive).
    """

    targeted: bool
    attention: dict[str, Any] = field(default_factory=dict)

    def plain(self, in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
        return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)

    def target(self, in_channels: int, out_channels: int, kernel_size: int, block: int) -> nn.Conv2d:
        """A convolution in bold in Table 1: a target layer in the block'th power of beta if the network is targeted."""
        if not self.targeted:
            return self.plain(in_channels, out_channels, kernel_size)
        options = dict(self.attention)
        kind = {key: options.pop(key) for key in PLAIN if key in options}
        layer = target_layer(2, **kind)(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=False,
            block=block,
            **options,
        )
        assert isinstance(layer, nn.Conv2d)
        return layer


def initialise(model: nn.Module) -> None:
    """He et al.'s normal initialisation (fan in, ReLU) of every convolution and FC layer, biases zero (Sec. 4.2)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # Then: some have layers of their own that start as zeros.
    for module in model.modules():
        if isinstance(module, RoiLayer):
            module.reset_attention()


def require_size(name: str, input_size: tuple[int, int, int], least: int) -> None:
    """ValueError if the images are smaller than the network's poolings allow."""
    channels, height, width = input_size
    if channels < 1 or min(height, width) < least:
        raise ValueError(
            f"model {name} takes images of at least {least}x{least} pixels and 1 channel, "
            f"not input_size={channels}x{height}x{width} (C x H x W)"
        )
