"""A network over every window of a large image, as a detector goes over a picture (Sec. 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tkn.crops import Pair, convolved_rows, in_batches, shares, windows_of
from tkn.evaluating import evaluating
from tkn.plan.plan import Plan
from tkn.sequential import TargetSequential, hooked

#: Windows computed at once: of a network so many, whose maps stay in the cache; of a plan, which sees to that itself,
#: so many bytes.
_BATCH = 32
_BYTES = 64 * 2**20
#: Kinds of networks that are their layers, one after the other.
_PLAIN = (nn.Sequential, TargetSequential)


@dataclass(frozen=True)
class Detections:
    """What was found, the surest first: boxes [N, 4] (x1, y1, x2, y2), probabilities [N], labels int64 [N]."""

    boxes: Tensor
    probabilities: Tensor
    labels: Tensor


@dataclass(frozen=True)
class WindowScores:
    """What a network says of every window of an image.

    scores: its outputs, [outputs, rows, columns]; window, stride: (height, width) in pixels.
    """

    scores: Tensor
    window: Pair
    stride: Pair

    @cached_property
    def boxes(self) -> Tensor:
        """The windows in pixels of the image: float32 [rows, columns, 4], x1, y1, x2, y2, as torchvision has boxes."""
        rows, columns = (
            step * torch.arange(n, device=self.scores.device)
            for step, n in zip(self.stride, self.scores.shape[1:], strict=True)
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        height, width = self.window
        return torch.stack((x, y, x + width, y + height), dim=-1).float()

    @cached_property
    def probabilities(self) -> Tensor:
        """The softmax over the outputs, the sigmoid of a single one: [outputs, rows, columns]."""
        return self.scores.sigmoid() if len(self.scores) == 1 else self.scores.softmax(0)

    def heat_map(self) -> Tensor:
        """For each pixel of the image the mean probability of the windows that hold it: [outputs, H, W]."""
        windows = torch.cat((self.probabilities, torch.ones_like(self.probabilities[:1])))[:, None]
        ones = windows.new_ones(1, 1, *self.window)
        *sums, count = F.conv_transpose2d(windows, ones, stride=self.stride)[:, 0]
        return torch.stack(sums) / count

    def detections(self, threshold: float, *, overlap: float = 0.3, background: int | None = None) -> Detections:
        """The windows of which the network is sure, each object's surest alone (torchvision's non-maximum suppression).

        threshold: the least probability, above 0, of a window's likeliest output; overlap: two windows that have a
        larger part of their union in common hold one object, whatever their labels; background: the output that says
        that nothing is there, which is never found. ValueError for numbers outside of their ranges.
        """
        from torchvision.ops import nms  # here, for it takes seconds to import

        for name, value in (("threshold", threshold), ("overlap", overlap)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie within [0, 1]")
        outputs = len(self.scores)
        if background is not None and not (_is_integer(background) and 0 <= background < outputs):
            raise ValueError(f"background={background} must be one of the {outputs} outputs, from 0")
        sure = self.probabilities.flatten(1)
        best = sure.max(0)
        found = best.values >= threshold
        if background is not None:
            found &= best.indices != background
        boxes, probabilities, labels = self.boxes.flatten(0, 1)[found], best.values[found], best.indices[found]
        kept = nms(boxes, probabilities.float(), overlap)
        return Detections(boxes[kept], probabilities[kept], labels[kept])


def slide(
    model: nn.Module,
    image: Tensor,
    stride: int | Pair,
    *,
    window: int | Pair | None = None,
    batch_size: int | None = None,
) -> WindowScores:
    """The network's outputs for every window of a large image, each as if the window were cut out and given to it.

    Kernels keep their ROIs within each window, and each window is padded at its own borders. So what windows have in
    common ends at the first window function: of a network that is an `nn.Sequential` and begins with a plain
    convolution (the DenseNets) this convolution is computed once for a whole row of windows. A plan computes it faster
    in each window than it could read it from elsewhere, and takes windows as they are.

    Args:
        model: a plan (`tkn.accelerate`), which is the fastest, or a network, computed in evaluation mode; it takes
            images [B, C, h, w] and returns [B, outputs].
        image: [C, H, W], of the network's type and on its device.
        stride: pixels from one window to the next, down and to the right.
        window: (h, w), the size of the images that the network was trained on; a plan knows it.
        batch_size: windows computed at once; by default 32 of a network, and of a plan as many as 64 MiB hold.

    Without gradients. ValueError for a window larger than the image, a stride larger than the window, or one that
    leaves rows or columns of the image in no window; for another kind of image or of outputs.
    """
    if not isinstance(image, Tensor) or image.dim() != 3 or not image.is_floating_point():
        told = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise ValueError(f"image must be a floating-point tensor [C, H, W], not {told}")
    _check_type(model, image)
    sides = _window(model, image, window)
    steps = _pair("stride", stride)
    for axis, length, side, step in zip(("height", "width"), image.shape[1:], sides, steps, strict=True):
        _check_axis(axis, length, side, step)
    if batch_size is None:
        a_window = image.shape[0] * sides[0] * sides[1] * image.element_size()
        batch_size = max(model.batch_size, _BYTES // a_window) if isinstance(model, Plan) else _BATCH
    elif not _is_integer(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number, at least 1")
    with evaluating(model):
        network, batches = _batches(model, image, sides, steps, int(batch_size))
        outputs = torch.cat([_outputs(network, batch) for batch in batches])
    counts = [(length - side) // step + 1 for length, side, step in zip(image.shape[1:], sides, steps, strict=True)]
    return WindowScores(outputs.T.unflatten(1, counts), sides, steps)


def _batches(
    model: nn.Module, image: Tensor, window: Pair, stride: Pair, size: int
) -> tuple[Callable[[Tensor], Any], Iterator[Tensor]]:
    """What takes the windows, and these in batches: the network, or what of it comes after its first convolution."""
    if isinstance(model, nn.Sequential) and type(model) in _PLAIN and len(model) > 1 and not _is_watched(model):
        first = model[0]
        if shares(first, window) and not _is_watched(first):
            rows = convolved_rows(first, image, window, stride)
            return model[1:], (batch for row in rows for batch in row.split(size))
    return model, in_batches(windows_of(image, window, stride), size)


def _is_watched(layer: nn.Module) -> bool:
    """Whether calling it does more than its class: hooks, or a `forward` of its own."""
    return hooked(layer) or "forward" in vars(layer)


def _outputs(network: Callable[[Tensor], Any], batch: Tensor) -> Tensor:
    outputs = network(batch)
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(batch):
        told = list(outputs.shape) if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ValueError(f"the network must give [B, outputs], not {told} for {len(batch)} windows")
    return outputs


def _window(model: nn.Module, image: Tensor, window: int | Pair | None) -> Pair:
    if not isinstance(model, Plan):
        if window is None:
            raise ValueError("window=(h, w) must be given: the size that the network takes, which only a plan knows")
        return _pair("window", window)
    size = model.input_size
    if not isinstance(size, tuple) or len(size) != 3:
        raise ValueError(f"the plan must take images (C, H, W), not {size}")
    channels, *sides = size
    if channels != image.shape[0]:
        raise ValueError(f"the plan takes images of {channels} channels, not of {image.shape[0]}")
    if window is not None and _pair("window", window) != tuple(sides):
        raise ValueError(f"window={window} is not the plan's, {tuple(sides)}")
    return sides[0], sides[1]


def _check_type(model: nn.Module, image: Tensor) -> None:
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), image)
    converted = torch.is_autocast_enabled(image.device.type)
    if image.device != like.device or (image.dtype != like.dtype and not converted):
        raise ValueError(
            f"image is {image.dtype} on {image.device}, and the network {like.dtype} on {like.device}: "
            "they must be alike"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _pair(name: str, value: int | Pair) -> Pair:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(_is_integer(n) and n >= 1 for n in pair):
        raise ValueError(f"{name}={value!r} must be a whole number of pixels of at least 1, or two (down, right)")
    return int(pair[0]), int(pair[1])


def _check_axis(axis: str, length: int, side: int, step: int) -> None:
    if side > length:
        raise ValueError(f"the window's {axis} of {side} is larger than the image's, {length}")
    if step > side:
        raise ValueError(f"stride={step} is larger than the window's {axis} of {side}: pixels between windows are lost")
    rest = (length - side) % step
    if rest:
        raise ValueError(
            f"stride={step} leaves {rest} pixels of the image's {axis} of {length} in no window of {side}: crop it to "
            f"{length - rest}, or pad it to {length - rest + step}"
        )
