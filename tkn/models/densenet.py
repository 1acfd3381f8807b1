"""DN10, DN40 and their targeted versions: DenseNets whose blocks' 3x3 convolutions are targeted (Table 1, Sec. 4.3)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from tkn.models.common import Convolutions, require_size
from tkn.normed import joins, normed_sequential


class DenseLayer(nn.Module):
    """Concatenates its input and `growth` new channels: BN-ReLU-(1x1 conv, BN-ReLU-)3x3 conv.

    [B, C, H, W] -> [B, C + growth, H, W].
    """

    def __init__(
        self,
        channels: int,
        growth: int,
        bottleneck: int | None,
        dropout: float,
        block: int,
        convolutions: Convolutions,
    ) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if bottleneck is not None:
            layers["norm0"] = nn.BatchNorm2d(channels)
            layers["relu0"] = nn.ReLU()
            layers["conv0"] = convolutions.plain(channels, bottleneck, 1)
            layers["drop0"] = nn.Dropout(dropout)
            channels = bottleneck
        layers["norm1"] = nn.BatchNorm2d(channels)
        layers["relu1"] = nn.ReLU()
        layers["conv1"] = convolutions.target(channels, growth, 3, block=block)
        layers["drop1"] = nn.Dropout(dropout)
        self.layers = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, normed_sequential(self.layers, x)), dim=1)


def trains_on_contiguous_maps(model: nn.Module, device: torch.device, autocast: torch.dtype | None) -> bool:
    """Whether training steps on `device` under `autocast` are faster with contiguous maps than with channels last.

    They are where layers are joined, which are joined on contiguous maps alone (`normed_sequential`).
    """
    joined = any(isinstance(module, DenseLayer) and joins(module.layers) for module in model.modules())
    return joined and device.type == "cpu" and autocast == torch.bfloat16


def _transition(channels: int, out_channels: int, dropout: float, convolutions: Convolutions) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            conv=convolutions.plain(channels, out_channels, 1),
            drop=nn.Dropout(dropout),
            pool=nn.AvgPool2d(2),
        )
    )


def _densenet(
    name: str,
    input_size: tuple[int, int, int],
    num_outputs: int,
    convolutions: Convolutions,
    *,
    growth: int,
    depth: int,
    bottleneck: int | None,
    compression: float,
    dropout: float,
) -> nn.Sequential:
    """Three dense blocks of `depth` layers, transitions between; first convolution of 2 x growth kernels."""
    require_size(name, input_size, 4)
    channels = 2 * growth
    network: OrderedDict[str, nn.Module] = OrderedDict(conv=convolutions.plain(input_size[0], channels, 3))
    for block in range(3):
        layers = []
        for _ in range(depth):
            layers.append(DenseLayer(channels, growth, bottleneck, dropout, block, convolutions))
            channels += growth
        network[f"block{block + 1}"] = nn.Sequential(*layers)
        if block < 2:
            out_channels = int(channels * compression)
            network[f"transition{block + 1}"] = _transition(channels, out_channels, dropout, convolutions)
            channels = out_channels
    network.update(
        norm=nn.BatchNorm2d(channels),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(channels, num_outputs),
    )
    return nn.Sequential(network)


def dn10(
    name: str, input_size: tuple[int, int, int], num_outputs: int, convolutions: Convolutions, dropout: float = 0.0
) -> nn.Sequential:
    """Growth 12, three blocks of two 3x3 convolutions, no compression. At least 4x4 pixels."""
    return _densenet(
        name,
        input_size,
        num_outputs,
        convolutions,
        growth=12,
        depth=2,
        bottleneck=None,
        compression=1.0,
        dropout=dropout,
    )


def dn40(
    name: str, input_size: tuple[int, int, int], num_outputs: int, convolutions: Convolutions, dropout: float = 0.2
) -> nn.Sequential:
    """Growth 36, three blocks of six (1x1 conv 72, 3x3 conv 36), compression 0.5. At least 4x4 pixels.

    The bottleneck is 2 x growth, not DenseNet-BC's usual 4 x: with it the paper's counts come out.
    """
    return _densenet(
        name,
        input_size,
        num_outputs,
        convolutions,
        growth=36,
        depth=6,
        bottleneck=72,
        compression=0.5,
        dropout=dropout,
    )
