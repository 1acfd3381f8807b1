"""Target layers whose ROIs follow the image: the static ones, moved and scaled by a network (Sec. 6)."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tkn.attention import at_least_float32, standardised
from tkn.backends.torch.fourier import uses_fourier
from tkn.backends.torch.masked import convolve
from tkn.layers import TargetConvNd
from tkn.locator import Locator
from tkn.ops.operator import by_torch
from tkn.roi import least_scale, projected_loc, roi_bounds, roi_mask


class _AdaptiveConv(TargetConvNd):
    other_rois = "whose ROIs are of each image"
    in_channels: int
    #: [dims]: the mean over the last training pass's images of the scales' squared factors, until `train` or `eval`
    _squared_factor: Tensor | None = None
    #: how far the ROIs of the last training pass's images were moved, and times how much they were scaled: [B, dims]
    moves: tuple[Tensor, Tensor] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.engine == "roi":
            raise ValueError(
                f"engine=roi computes no {type(self).__name__}: the ROI engine knows no ROIs of each image"
            )
        self.locator = Locator(self.in_channels, self.num_dims, self.weight.device, self.weight.dtype)

    def reset_attention(self) -> None:
        """Every ROI the whole map in every image."""
        super().reset_attention()
        self.locator.reset_location()

    def reset_parameters(self) -> None:
        """Weight, bias and the small network as torch's layers start, and every ROI the whole map in every image."""
        if "locator" in self._modules:
            self.locator.reset_parameters()
        super().reset_parameters()

    def squared_scales(self) -> Tensor:
        """As of the images of the last training pass, whose mean over them it is; without one since the last `train` or
        `eval`, of the static ROIs."""
        static, factor = super().squared_scales(), self._squared_factor
        return static if factor is None else static * factor.unsqueeze(1)

    def train(self, mode: bool = True) -> Self:
        self._squared_factor = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with gradients behind it can't be copied; the moves are of images that a copy has not seen.
        return {**self.__dict__, "_squared_factor": None, "moves": None}

    def located(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """loc and scale of each image of `input` [B, Cin, *size], within their range: both [B, dims, Cout]."""
        kernel = self.weight.shape[2:]
        size = self.target().spec.output_size(self.padded(input).shape[2:], kernel)
        # Half precision could not place a pixel.
        with torch.autocast(input.device.type, enabled=False):
            move, factor = self.locator(input)
            if self.training and torch.is_grad_enabled():
                self._squared_factor = at_least_float32(factor).square().mean(dim=0)
                self.moves = move.detach(), factor.detach()
            static = at_least_float32(self.scale)
            locs, scales = [], []
            for axis, (length, wanted) in enumerate(zip(size, self.min_size, strict=True)):
                least = min(wanted, length)
                scale = static[axis] * factor[:, axis, None]
                scale = _held(scale, scale.clamp(min=least_scale(least, length, scale.dtype), max=1))
                loc = at_least_float32(self.loc[axis]) + move[:, axis, None]
                locs.append(_held(loc, projected_loc(loc, scale, least / length, loc.dtype)))
                scales.append(scale)
        return torch.stack(locs, dim=1), torch.stack(scales, dim=1)

    def _convolved(self, input: Tensor) -> Tensor:
        return self._dense(input)

    def _dense(self, input: Tensor) -> Tensor:
        if input.dim() == self.num_dims + 1:
            return self._dense(input.unsqueeze(0)).squeeze(0)
        frequencies = uses_fourier(self) and not by_torch("dense", input)
        y = convolve(self.padded(input), self.target(), fourier=frequencies)
        size = y.shape[2:]
        loc, scale = (each.transpose(0, 1).flatten(1) for each in self.located(input))
        rois = roi_bounds(size, loc, scale)
        # Axis by axis: the maps of all windows would be as large as the convolution's result.
        for axis, length in enumerate(size):
            along = self.attention_function(standardised(length, loc[axis], scale[axis], self.scale_unit))
            if self.clip:
                along = torch.where(roi_mask((length,), rois[:, axis : axis + 1]), along, 0.0)
            others = [1] * (self.num_dims - axis - 1)
            y = y * along.to(y.dtype).view(*y.shape[:2], *[1] * axis, length, *others)
        return y

    def why(self, input: Tensor) -> str:
        del input
        return "dense: the ROI engine knows no ROIs of each image"

    def image_rois(self, input: Tensor) -> Tensor:
        """Every kernel's ROI in each image of `input` [B, Cin, *size]: int64 [B, Cout, dims, 2], (lo, hi) half-open.

        One image [Cin, *size] is a batch of one.
        """
        if input.dim() == self.num_dims + 1:
            input = input.unsqueeze(0)
        size = self.target().spec.output_size(self.padded(input).shape[2:], self.weight.shape[2:])
        loc, scale = (each.transpose(0, 1).flatten(1) for each in self.located(input))
        return roi_bounds(size, loc, scale).unflatten(0, (len(input), -1))


def _held(value: Tensor, within: Tensor) -> Tensor:
    """What is `within` the limits, with the gradients of `value`: as parameters have theirs before a projection."""
    return value + (within - value).detach()


class AdaptiveConv1d(_AdaptiveConv, nn.Conv1d):
    """`AdaptiveConv2d` in one dimension: [B, Cin, L] -> [B, Cout, L']; the same arguments."""

    num_dims = 1


class AdaptiveConv2d(_AdaptiveConv, nn.Conv2d):
    """`TargetConv2d` whose ROIs follow the image: [B, Cin, H, W] -> [B, Cout, H', W'].

    `loc` and `scale` [dims, Cout] are the ROIs as they start, and what `window`, `rois` and `project_` are about.
    `locator`, a small network on the layer's input, moves all of them alike and makes them up to twice or half as large
    along each axis, in each image its own way (`image_rois`); it learns with the rest, by the gradients of the windows.
    At the start it does nothing. What it takes is counted. The scale penalty is on the scales of the images.

    The arguments of `TargetConv2d`. Always computed dense, then masked: engine="roi" is refused. Multiply-adds inside
    the ROIs depend on the images: `tkn.ImageRois` has their mean over those that it sees.
    """

    num_dims = 2


class AdaptiveConv3d(_AdaptiveConv, nn.Conv3d):
    """`AdaptiveConv2d` in three dimensions: [B, Cin, D, H, W] -> [B, Cout, D', H', W']; the same arguments."""

    num_dims = 3


def adaptive_layers(model: nn.Module) -> dict[str, _AdaptiveConv]:
    """The model's layers whose ROIs follow the image, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _AdaptiveConv)}


def locator_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters of what finds the ROIs of each image, as in `model.named_parameters()`."""
    return {
        ".".join(filter(None, (layer, "locator", parameter)))
        for layer, module in adaptive_layers(model).items()
        for parameter, _ in module.locator.named_parameters()
    }


class ImageRois:
    """The mean ROIs of a model's adaptive layers over the images that it sees within the context.

        with tkn.ImageRois(model) as rois, torch.no_grad():
            for images in test:
                model(images)
        tkn.count_macs(model, (1, 56, 56), rois)

    What torch.compile compiled before the context may pass unseen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: Mapping[_AdaptiveConv, str] = {layer: name for name, layer in adaptive_layers(model).items()}
        self._handles: list[RemovableHandle] = []
        #: by the layer's name and its map's size: the sums over images of the kernels' pixels and of the mean sides
        self._sums: dict[tuple[str, tuple[int, ...]], tuple[int, Tensor, Tensor]] = {}

    def __enter__(self) -> ImageRois:
        self._handles = [layer.register_forward_hook(self._see, with_kwargs=True) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _see(self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        assert isinstance(layer, _AdaptiveConv)
        rois = layer.image_rois(*args, **kwargs)
        sides = rois[..., 1] - rois[..., 0]
        pixels, means = sides.prod(dim=2).sum(), sides.double().mean(dim=1).sum(dim=0)
        key = self._layers[layer], tuple(output.shape[-layer.num_dims :])
        images, before, means_before = self._sums.get(key, (0, torch.zeros_like(pixels), torch.zeros_like(means)))
        self._sums[key] = images + len(rois), before + pixels, means_before + means

    def pixels(self, name: str, size: tuple[int, ...]) -> float | None:
        """The mean over images of the pixels inside all ROIs of a layer, on maps of `size`; None if none was seen."""
        images, pixels, _ = self._sums.get((name, size), (0, None, None))
        return None if pixels is None else int(pixels) / images

    def sides(self, name: str, size: tuple[int, ...]) -> tuple[float, ...] | None:
        """The mean over images and kernels of the ROIs' sides in pixels, per axis; None if no image was seen."""
        images, _, sides = self._sums.get((name, size), (0, None, None))
        return None if sides is None else tuple((sides / images).tolist())
