"""Where to look in each image: a small network that moves and scales a layer's ROIs by the layer's input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: The input's maps are averaged down to so many cells an axis, which all that follows is computed on.
_CELLS = 14
#: Channels between, and the sides of the two kernels that look for the place.
_CHANNELS, _NEAR, _FAR = 8, 3, 5
#: Times what the last two layers say: a step of gradient descent moves the ROIs a sixteenth as far, one of Adam a
#: quarter. At the rate of convolutions the place can run into a corner for all images, where nothing brings it back.
_OUTPUT = 0.25

_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MEANS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


class Locator(nn.Module):
    """[B, C, *size] -> how far the ROIs of each image are moved, and how many times they are as large: both [B, dims].

    The move, in fractions of the map's side, is from the middle of the map to the mean place of a saliency map's
    softmax: the same pattern elsewhere moves the ROIs along. The scale's factor is within (1/2, 2). At the start no
    image's ROIs are moved or scaled, exactly.
    """

    def __init__(
        self, channels: int, dims: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.dims = dims
        convolution = _CONVOLUTIONS[dims]
        self.reduce = convolution(channels, _CHANNELS, 1, device=device, dtype=dtype)
        self.near = convolution(_CHANNELS, _CHANNELS, _NEAR, padding=_NEAR // 2, device=device, dtype=dtype)
        # Without a bias: a softmax does not see it.
        self.saliency = convolution(_CHANNELS, 1, _FAR, padding=_FAR // 2, bias=False, device=device, dtype=dtype)
        self.size = nn.Linear(_CHANNELS, dims, device=device, dtype=dtype)
        self.reset_location()

    def reset_location(self) -> None:
        """Neither move nor scale ROIs, whatever the input."""
        for layer in (self.saliency, self.size):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.size.bias)

    def reset_parameters(self) -> None:
        """Weights as torch's layers start, of ROIs that are neither moved nor scaled."""
        for layer in (self.reduce, self.near):
            layer.reset_parameters()
        self.reset_location()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cells = [min(_CELLS, length) for length in x.shape[2:]]
        # The cells alone need the weights' precision; to convert the whole input takes as long as to average it.
        features = _MEANS[self.dims](x, cells).to(self.reduce.weight.dtype)
        # Of a layer's input nobody knows the range.
        features = F.layer_norm(features, features.shape[1:])
        features = F.relu(self.near(F.relu(self.reduce(features))))
        # Else the weights of all layers would multiply: the larger they are, the larger their gradients.
        features = F.layer_norm(features, features.shape[1:])
        share = (_OUTPUT * self.saliency(features)).flatten(1).softmax(1)
        places = self._places(cells, share)
        move = (share - 1 / share.shape[1]) @ places
        there = (features.flatten(2) @ share.unsqueeze(2)).squeeze(2)
        return move, 2 ** (_OUTPUT * self.size(there)).tanh()

    def _places(self, cells: list[int], like: Tensor) -> Tensor:
        """The cells' centres in fractions of the map's side: [cells, dims]."""
        axes = [(torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count for count in cells]
        return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], dim=1)
