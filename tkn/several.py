"""Target layers with several windows for each output channel: mixtures, and kernels that are parts (Sec. 6)."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tkn.app.messages import unknown
from tkn.backends.torch.fourier import uses_fourier
from tkn.backends.torch.masked import convolve
from tkn.backends.torch.weigh import weigh
from tkn.layers import TargetConv1d, TargetConv2d, TargetConv3d, TargetConvNd
from tkn.ops.operator import by_torch
from tkn.roi import roi_mask

Combine = Literal["max", "sum", "parts"]
COMBINE: tuple[Combine, ...] = ("max", "sum", "parts")

_TARGETS = (TargetConv1d, TargetConv2d, TargetConv3d)

#: Of the map's side: windows that start at the same place would stay together. All their ROIs are the whole map.
_APART = 0.05


def check_windows(windows: int) -> int:
    """`windows`, if it is a number of windows; else a ValueError."""
    if type(windows) is not int or windows < 1:
        raise ValueError(f"windows={windows!r} must be a whole number, at least 1")
    return windows


def check_combine(combine: str, among: tuple[Combine, ...] = COMBINE) -> str:
    """`combine`, if it is a way `among` these to make one channel of several windows; else a ValueError."""
    if combine not in among:
        raise ValueError(unknown("combine", combine, among))
    return combine


class _SeveralWindowsConv(TargetConvNd):
    """The K windows of output channel c are those from c * K on: of loc, scale, `window` and `rois`."""

    windows: int

    def _set_windows(self, windows: int, channels: int) -> None:
        self.windows = windows
        self._register_attention(windows * channels, self.weight.device, self.weight.dtype)
        self.reset_attention()

    @property
    def num_kernels(self) -> int:
        return self.windows * self.out_channels

    def reset_attention(self) -> None:
        """Every ROI is the whole map; the windows of a channel are a little apart around its middle."""
        super().reset_attention()
        if "windows" in vars(self):
            with torch.no_grad():
                self.loc.add_(self._apart(self.loc))

    def _start(self, like: Tensor) -> dict[str, Tensor]:
        start = super()._start(like)
        return {**start, "loc": start["loc"] + self._apart(start["loc"])}

    def _apart(self, like: Tensor) -> Tensor:
        """[dims, K * C]: from the map's middle to the windows' first places, on a circle in the first two axes that
        each channel turns; in one dimension evenly along it, shifted by the channel."""
        if self.windows == 1:
            return torch.zeros_like(like)
        golden = 0.6180339887
        window = torch.arange(self.num_kernels, device="cpu", dtype=torch.float64)
        turns = window % self.windows / self.windows + golden * (window // self.windows)
        circle = [torch.cos(2 * pi * turns), torch.sin(2 * pi * turns), torch.zeros_like(turns)]
        axes = [2 * (turns % 1) - 1] if self.num_dims == 1 else circle[: self.num_dims]
        return (_APART * torch.stack(axes)).to(like)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, windows={self.windows}"


class _MixtureConv(_SeveralWindowsConv):
    other_rois = "whose ROIs are unions of rectangles"

    def __init__(self, *args: Any, windows: int = 2, combine: Literal["max", "sum"] = "max", **kwargs: Any) -> None:
        check_windows(windows)
        check_combine(combine, ("max", "sum"))
        super().__init__(*args, **kwargs)
        if self.engine == "roi":
            raise ValueError(f"engine=roi computes no {type(self).__name__}: its ROIs are unions of rectangles")
        self.combine = combine
        self._set_windows(windows, self.out_channels)

    def mixture(self, size: tuple[int, ...]) -> Tensor:
        """The maximum or the sum of each channel's windows on a map of spatial size `size`, zero outside their ROIs'
        union if `clip`: [Cout, *size]."""
        windows = self.window(size).unflatten(0, (self.out_channels, self.windows))
        mixture = windows.amax(dim=1) if self.combine == "max" else windows.sum(dim=1)
        return torch.where(self.union(size), mixture, 0.0) if self.clip else mixture

    def union(self, size: tuple[int, ...]) -> Tensor:
        """True in each channel's ROI, the union of its windows' ROIs, on a map of size `size`: bool [Cout, *size]."""
        return roi_mask(tuple(size), self.rois(size)).unflatten(0, (self.out_channels, self.windows)).any(dim=1)

    def areas(self, size: tuple[int, ...]) -> Tensor:
        return self.union(size).flatten(1).sum(dim=1)

    def _convolved(self, input: Tensor) -> Tensor:
        return self._dense(input)

    def _dense(self, input: Tensor) -> Tensor:
        convolved = convolve(
            self.padded(input), self.target(), fourier=uses_fourier(self) and not by_torch("dense", input)
        )
        return weigh(convolved, self.mixture(tuple(convolved.shape[-self.num_dims :])).to(convolved.dtype))

    def why(self, input: Tensor) -> str:
        del input
        return "dense: the ROI engine knows one window a kernel, no mixture"

    def _learned_with(self) -> dict[str, Any]:
        return {**super()._learned_with(), "windows": self.windows, "combine": self.combine}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, combine={self.combine}"


class MixtureConv1d(_MixtureConv, nn.Conv1d):
    """`MixtureConv2d` in one dimension: [B, Cin, L] -> [B, Cout, L']; the same arguments."""

    num_dims = 1


class MixtureConv2d(_MixtureConv, nn.Conv2d):
    """`TargetConv2d` whose output channels have several windows each: convolution, times their maximum or sum, zero
    outside the union of their ROIs. [B, Cin, H, W] -> [B, Cout, H', W'].

    Args beyond those of `TargetConv2d`:
        windows: K, of each output channel.
        combine: "max" or "sum" of the windows.

    `loc`, `scale` have shape [dims, Cout * K], and `window` and `rois` are of all windows: those of channel c are the K
    from c * K on. `mixture` is what a channel is multiplied by, `union` its ROI. Always computed dense, then masked:
    engine="roi" is refused. ValueError for impossible arguments.
    """

    num_dims = 2


class MixtureConv3d(_MixtureConv, nn.Conv3d):
    """`MixtureConv2d` in three dimensions: [B, Cin, D, H, W] -> [B, Cout, D', H', W']; the same arguments."""

    num_dims = 3


class _SumOfParts(nn.Module):
    """[B, C * K, *size] -> [B, C, *size], by operations that plans know."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, x: Tensor) -> Tensor:
        total = x[:, :: self.windows]
        for part in range(1, self.windows):
            total = total + x[:, part :: self.windows]
        return total


class PartsConvNd(_SeveralWindowsConv):
    """The parts' half of `PartsConv2d`, in any number of dimensions."""

    in_channels: int
    padding: Any

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, *args: Any, windows: int = 2, **kwargs: Any
    ) -> None:
        check_windows(windows)
        super().__init__(in_channels, windows * out_channels, kernel_size, *args, **kwargs)
        if out_channels % self.groups:
            raise ValueError(f"out_channels={out_channels} must be divisible by groups={self.groups}")
        self.out_channels = out_channels
        self._set_windows(windows, out_channels)

    def _convolved(self, input: Tensor) -> Tensor:
        return self._summed(super()._convolved(input))

    def dense(self, input: Tensor) -> Tensor:
        """Every part's convolution of the whole map, times its window, zero outside its ROI if `clip`; their sums."""
        return self._summed(self._dense(input))

    def _summed(self, parts: Tensor) -> Tensor:
        """[..., Cout * K, *size] -> [..., Cout, *size]"""
        channels = -1 - self.num_dims
        return parts.unflatten(channels, (self.out_channels, self.windows)).sum(dim=channels)

    def take_kernels_(self, weight: Tensor, bias: Tensor | None) -> None:
        """Make every part the K'th part of a convolution's kernel, so that their sums are that convolution's."""
        learns = {"weight": weight.requires_grad, "bias": bias is not None and bias.requires_grad}
        for name, whole in self.shared_kernels(weight, bias).items():
            setattr(self, name, nn.Parameter(whole, requires_grad=learns[name]))

    def unrolled(self) -> nn.Sequential:
        """The same of two layers: a target layer of all parts, which shares this one's parameters, and their sums."""
        geometry = (self.in_channels, self.num_kernels, self.kernel_size, self.stride, self.padding, self.dilation)
        layer = _TARGETS[self.num_dims - 1](
            *geometry,
            self.groups,
            self.bias is not None,
            attention=self.attention,
            scale_unit=self.scale_unit,
            clip=self.clip,
            block=self.block,
            engine=self.engine,
            padding_mode=self.padding_mode,
            device="meta",
        )
        layer.min_size = self.min_size
        for name, parameter in self.named_parameters():
            setattr(layer, name, parameter)
        return nn.Sequential(layer, _SumOfParts(self.windows)).train(self.training)

    def join_kernels_(self) -> None:
        """Make the parts of each output channel one kernel, their sum: without windows they are no more."""
        for name in ("weight", "bias"):
            if (parts := getattr(self, name)) is not None:
                whole = parts.detach().unflatten(0, (self.out_channels, self.windows)).sum(dim=1)
                setattr(self, name, nn.Parameter(whole, requires_grad=parts.requires_grad))

    def shared_kernels(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The K'th part of each of a convolution's kernels for each part of its channel, by the parameter's name."""
        given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return {
            # Joined row by row: unlike repeat_interleave this keeps the memory format.
            name: torch.cat([row for row in each.detach().split(1) for _ in range(self.windows)]) / self.windows
            for name, each in given.items()
        }

    def shared_state(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
        """A dense convolution's weight and bias in a state dict, names beginning with `prefix`, as those of all parts;
        nothing if it has none."""
        weight, bias = (state_dict.get(prefix + name) for name in ("weight", "bias"))
        if not isinstance(weight, Tensor) or self.windows == 1 or len(weight) != self.out_channels:
            return {}
        return {prefix + name: whole for name, whole in self.shared_kernels(weight, bias).items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict |= self.shared_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _learned_with(self) -> dict[str, Any]:
        return {**super()._learned_with(), "windows": self.windows}


class PartsConv1d(PartsConvNd, nn.Conv1d):
    """`PartsConv2d` in one dimension: [B, Cin, L] -> [B, Cout, L']; the same arguments."""

    num_dims = 1


class PartsConv2d(PartsConvNd, nn.Conv2d):
    """`TargetConv2d` whose output channels are sums of kernels that each have a window of their own: deformable parts.

    [B, Cin, H, W] -> [B, Cout, H', W']. As a `TargetConv2d` of K times the outputs and a sum over each K of them, which
    every engine computes. Args beyond those of `TargetConv2d`:
        windows: K, the parts of each output channel.

    `weight` is [Cout * K, Cin / groups, *kernel]; loc, scale, `window` and `rois` are of all parts: those of channel c
    are the K from c * K on. A dense convolution's state dict fits: each part begins as its K'th part. ValueError for
    impossible arguments.
    """

    num_dims = 2


class PartsConv3d(PartsConvNd, nn.Conv3d):
    """`PartsConv2d` in three dimensions: [B, Cin, D, H, W] -> [B, Cout, D', H', W']; the same arguments."""

    num_dims = 3
