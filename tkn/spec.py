"""What a target layer computes, beside its tensors: the arguments that the operators, the backends and plans share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tkn.attention import attention_function
from tkn.geometry import Geometry, Pool


@dataclass(frozen=True)
class TargetSpec:
    """A convolution of any number of dimensions, its window (Eq. 13), its ROI (Eq. 15), and what follows it.

    `padding`: zeros (before, after) each axis; `clip`: zero outside the ROIs; `relu`, `pool`: joined to the layer.
    """

    attention: str
    scale_unit: float
    clip: bool
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    relu: bool = False
    pool: Pool | None = None

    @property
    def dims(self) -> int:
        return len(self.stride)

    @property
    def joins(self) -> bool:
        """Whether a ReLU or a pooling is joined to the layer."""
        return self.relu or self.pool is not None

    def arguments(self) -> tuple[str, float, bool, tuple[int, ...], list[int], tuple[int, ...], int]:
        """As the operator `target_conv` takes them; `spec_of` makes a spec of them."""
        padding = [zeros for around in self.padding for zeros in around]
        return self.attention, self.scale_unit, self.clip, self.stride, padding, self.dilation, self.groups

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Of the convolution, on maps of `size`, with a kernel of `kernel` pixels; below 1 where it does not fit."""
        return tuple(
            (n + before + after - d * (k - 1) - 1) // s + 1
            for n, (before, after), d, k, s in zip(size, self.padding, self.dilation, kernel, self.stride, strict=True)
        )

    def geometry(self, size: Sequence[int], kernel: Sequence[int]) -> Geometry:
        """Of the convolution, on maps of `size`, with a kernel of `kernel` pixels."""
        before, after = zip(*self.padding, strict=True)
        return Geometry(tuple(size), tuple(kernel), self.stride, before, after, self.dilation)


@dataclass(frozen=True, eq=False)
class Target:
    """A target layer's tensors: weight [O, C / groups, *kernel], bias [O], loc and scale [dims, O] or [B, dims, O]."""

    spec: TargetSpec
    weight: Tensor
    bias: Tensor | None
    loc: Tensor
    scale: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are, in the order of the operators' arguments."""
        return [t for t in (self.weight, self.bias, self.loc, self.scale) if t is not None]

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def channels_last(self) -> bool:
        """Whether the weight, and so the layer's output, is in channels-last memory format."""
        weight = self.weight
        last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
        return last and not weight.is_contiguous()

    @property
    def per_image(self) -> bool:
        """Whether loc and scale are of each image."""
        return self.loc.dim() == 3

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Of the convolution, before pooling."""
        return self.spec.output_size(size, self.kernel)

    def result_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Of the layer with its pooling."""
        size = self.output_size(size)
        return size if self.spec.pool is None else self.spec.pool.output_size(size)


def encode(targets: Sequence[Target]) -> tuple[str, list[float]]:
    """The layers' specs as two arguments of an operator, which torch's compiler can follow; `decode` gives them back.

    Plain words and numbers, and the layers' scale units: a compiler may know these as variables, of which it makes no
    words.
    """
    return "; ".join(_words(target) for target in targets), [target.spec.scale_unit for target in targets]


def _words(target: Target) -> str:
    spec = target.spec
    padding = ",".join(f"{before},{after}" for before, after in spec.padding)
    stride, dilation = ",".join(map(str, spec.stride)), ",".join(map(str, spec.dilation))
    pool = "none"
    if spec.pool is not None:
        pool = f"{'average' if spec.pool.average else 'max'},{','.join(map(str, spec.pool.kernel))}"
    flags = f"{int(spec.clip)} {int(spec.relu)} {int(target.bias is not None)}"
    return f"{spec.attention} {stride} {padding} {dilation} {spec.groups} {pool} {flags}"


@lru_cache(maxsize=1024)
def _specs(layers: str, scale_units: tuple[float, ...]) -> tuple[tuple[TargetSpec, bool], ...]:
    pairs = zip(layers.split("; "), scale_units, strict=True)
    return tuple(_spec(words.split(), scale_unit) for words, scale_unit in pairs)


def _spec(words: Sequence[str], scale_unit: float) -> tuple[TargetSpec, bool]:
    attention, stride, padding, dilation, groups, pool, clip, relu, bias = words
    pads = _numbers(padding)
    kind, _, kernel = pool.partition(",")
    spec = TargetSpec(
        attention,
        scale_unit,
        clip == "1",
        _numbers(stride),
        tuple(zip(pads[::2], pads[1::2], strict=True)),
        _numbers(dilation),
        int(groups),
        relu == "1",
        None if kind == "none" else Pool(_numbers(kernel), kind == "average"),
    )
    return spec, bias == "1"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def decode(tensors: Sequence[Tensor], layers: str, scale_units: Sequence[float]) -> tuple[Target, ...]:
    """Target layers from their tensors, one after the other, and from what `encode` made of their specs.

    ValueError if these do not go together.
    """
    try:
        specs = _specs(layers, tuple(scale_units))
    except (ValueError, IndexError) as error:
        raise ValueError(f"layers={layers!r} are no target layers of scale_units={list(scale_units)}") from error
    count = sum(3 + bias for _, bias in specs)
    if len(tensors) != count:
        raise ValueError(f"{len(specs)} target layers need {count} tensors, not {len(tensors)}")
    left = iter(tensors)
    return tuple(Target(spec, next(left), next(left) if bias else None, next(left), next(left)) for spec, bias in specs)


def spec_of(
    attention: str,
    scale_unit: float,
    clip: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> TargetSpec:
    """A spec from the operator's arguments; `padding`: zeros before and after the first axis, then the next. ValueError
    for numbers that are no convolution's."""
    return _spec_of(attention, scale_unit, clip, tuple(stride), tuple(padding), tuple(dilation), groups)


@lru_cache(maxsize=1024)
def _spec_of(
    attention: str,
    scale_unit: float,
    clip: bool,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> TargetSpec:
    dims = len(stride)
    if dims not in (1, 2, 3) or len(padding) != 2 * dims or len(dilation) != dims:
        raise ValueError(
            f"stride={list(stride)}, padding={list(padding)} and dilation={list(dilation)} must have one, two (before "
            "and after) and one number for each of one to three axes"
        )
    if min(*stride, *dilation, groups) < 1 or min(padding) < 0:
        raise ValueError(
            f"stride={list(stride)}, dilation={list(dilation)} and groups={groups} must be positive, padding="
            f"{list(padding)} not negative"
        )
    attention_function(attention)
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return TargetSpec(attention, scale_unit, clip, stride, pairs, dilation, groups)
