"""All windows of an image in batches, and a convolution of them all that computes what they share once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tkn.geometry import pair

Pair = tuple[int, int]


def windows_of(image: Tensor, window: Pair, stride: Pair) -> Tensor:
    """The windows of an image [C, H, W], which share its memory: [rows, columns, C, *window]."""
    (height, width), (down, right) = window, stride
    return image.unfold(1, height, down).unfold(2, width, right).permute(1, 2, 0, 3, 4)


def in_batches(rows: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Rows of windows [columns, ...] one after the other as batches of `size`, the last one smaller."""
    held: list[Tensor] = []
    count = 0
    for row in rows:
        held.append(row)
        count += len(row)
        if count >= size:
            joined, full = torch.cat(held), count - count % size
            yield from joined[:full].split(size)
            held, count = [joined[full:]], count - full
    if count:
        yield torch.cat(held)


def shares(layer: nn.Module, window: Pair) -> TypeGuard[nn.Conv2d]:
    """Whether `convolved_rows` can do what a layer does of windows: a plain convolution of single steps, smaller than
    the window, with zeros around it."""
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or not isinstance(layer.padding, tuple):
        return False
    single = layer.stride == layer.dilation == (1, 1)
    return single and all(k <= n and p < k for k, n, p in zip(layer.kernel_size, window, layer.padding, strict=True))


def convolved_rows(conv: nn.Conv2d, image: Tensor, window: Pair, stride: Pair) -> Iterator[Tensor]:
    """What a convolution makes of each row of windows: [columns, O, H', W'], as of each window alone, whose neighbours
    in the image are zeros to it.

    A row of windows is a band of the image, which is convolved once. Near the left and right border of its window an
    output lacks the taps that lie outside: these are convolutions of their own, with the other taps, at one column for
    each window. `shares` says for which convolutions.
    """
    (height, width), (down, right) = window, stride
    columns = (image.shape[2] - width) // right + 1
    taps = conv.kernel_size[1]
    above, beside = pair(conv.padding)
    inner = width - taps + 1
    last = (columns - 1) * right + 1

    def convolve(band: Tensor, first: int, end: int, step: int) -> Tensor:
        """[O, H', ...] of a band [C, h, ...] by the taps' columns from `first` to `end`, bias included."""
        weight = conv.weight[..., first:end]
        return F.conv2d(band[None], weight, conv.bias, (1, step), (above, 0), groups=conv.groups)[0]

    for top in range(0, image.shape[1] - height + 1, down):
        band = image[:, top : top + height]
        whole = convolve(band, 0, taps, 1)
        made = whole.new_empty(columns, whole.shape[0], whole.shape[1], inner + 2 * beside)
        made[..., beside : beside + inner] = whole.unfold(2, inner, right).permute(2, 0, 1, 3)
        for missing in range(1, beside + 1):
            left = convolve(band[..., : last + taps - missing - 1], missing, taps, right)
            made[..., beside - missing] = left.permute(2, 0, 1)
            begin = width - taps + missing
            end = convolve(band[..., begin : begin + last + taps - missing - 1], 0, taps - missing, right)
            made[..., beside + inner + missing - 1] = end.permute(2, 0, 1)
        yield made
