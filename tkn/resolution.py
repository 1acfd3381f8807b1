"""A trained network at another resolution: its kernels' ROIs are parts of whatever map there is (Sec. 5)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from tkn.app.messages import first_line
from tkn.evaluating import evaluating, zeros_for
from tkn.layers import RoiLayer, roi_layers


def at_resolution(
    model: nn.Module, input_size: Sequence[int], *, resample_from: Sequence[int] | None = None
) -> nn.Module:
    """A copy of a network for images of another resolution or aspect ratio.

    loc and scale are parts of a map's sides, so every ROI stays where it is in the image; where it would have fewer
    than its layer's `min_size` pixels it grows to these. Weights stay as they are.

    Args:
        model: a network, targeted or not; it is left as it is.
        input_size: of the images, (C, H, W), or (C, L) in one dimension.
        resample_from: a fully connected layer that reads a map knows each of its pixels, so a network with one takes
            one resolution alone. With (C, H, W), the one that the network was trained at, such a layer is made to read
            larger or smaller maps as if they were resampled (bilinear, antialiased) to those that it knows: maps
            [C, H, W] whose pixels were flattened channel by channel.

    Returns the copy, in the mode of `model`. ValueError for a network with a fully connected layer after a map of more
    than one pixel, without `resample_from`, but for maps of an adaptive pooling; for a resolution that the network
    can't take, at which it gives several outputs for one image, or at which a map is smaller than its layer's
    `min_size`; for a plan, which is of one size.
    """
    size = _checked("input_size", input_size)
    trained = None if resample_from is None else _checked("resample_from", resample_from)
    model = copy.deepcopy(model)
    for layer in roi_layers(model).values():
        layer.map_size = None
    known = None if trained is None else _maps_read(model, trained)
    sizes = _fit_(model, size, known)
    for name, layer in roi_layers(model).items():
        for map_size in sizes.get(layer, ()):
            if any(length < least for length, least in zip(map_size, layer.min_size, strict=True)):
                raise ValueError(
                    f"at {_text(size)} the maps of layer {name!r} have {_text(map_size)} pixels, fewer than its "
                    f"min_size={_text(layer.min_size)}: its ROIs can't stay what they are"
                )
            layer.project_(map_size)
    return model


def _checked(name: str, size: Sequence[int]) -> tuple[int, ...]:
    given = tuple(size) if isinstance(size, Sequence) else ()
    if len(given) not in (2, 3, 4) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given):
        raise ValueError(f"{name}={size!r} must be (channels, height, width), whole numbers of at least 1")
    return given


def _text(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


#: What a fully connected layer computes by.
_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear}
#: What makes maps of one size of all others, but for the global average, which is a map of one pixel.
_ADAPTIVE = {
    getattr(torch.ops.aten, f"{prefix}adaptive_{kind}_pool{dims}d")
    for prefix, kind, dims in (("_", "avg", 2), ("_", "avg", 3), ("", "max", 2), ("", "max", 3), ("", "avg", 1))
}


class _Refused(ValueError):
    """A message of this module's own, from within a pass of the network."""


class _Maps(TorchDispatchMode):
    """Remembers the last map [1, C, ...] that anything made: what a fully connected layer after it reads, unless that
    is what another such layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        #: whether it has the same size whatever the network's input
        self.fixed = False
        #: what matrix products made, and what was made of that
        self._mixed = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = result[0] if isinstance(result, tuple) and result else result  # a pooling's, before its indices
        if isinstance(made, Tensor) and made.dim() > 2:
            from_last = any(each is self.last for each in given)
            self.last, self.fixed = made, func.overloadpacket in _ADAPTIVE or (self.fixed and from_last)
        elif isinstance(made, Tensor) and (func.overloadpacket in _PRODUCTS or any(x in self._mixed for x in given)):
            self._mixed[made] = True
        return result

    def read_by(self, linear_input: Tensor) -> tuple[int, ...] | None:
        """The size (C, ...) of the map that was flattened to `linear_input` [1, features]; None if there is none."""
        last = self.last
        if last is None or linear_input in self._mixed or linear_input.shape != (1, last.numel()):
            return None
        return tuple(last.shape[1:])


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Maps]:
    with evaluating(model), _Maps() as maps:
        yield maps


def _maps_read(model: nn.Module, size: tuple[int, ...]) -> dict[nn.Linear, tuple[int, ...]]:
    """The map (C, ...) that each fully connected layer reads whose input is one, on images of `size`."""
    known: dict[nn.Linear, tuple[int, ...]] = {}
    with _watched(model) as maps:

        def note(linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
            read = maps.read_by(args[0])
            if read is not None:
                known[linear] = read

        _run(model, size, note, "resample_from: ")
    return known


def _fit_(
    model: nn.Module, size: tuple[int, ...], known: dict[nn.Linear, tuple[int, ...]] | None
) -> dict[RoiLayer, set[tuple[int, ...]]]:
    """Run the network on images of `size`; a fully connected layer that then reads another map than in `known` is
    resampled in place. Returns the sizes of all maps of each ROI layer that ran."""
    names = {module: name for name, module in model.named_modules()}
    done: dict[nn.Linear, tuple[int, ...]] = {}
    sizes: dict[RoiLayer, set[tuple[int, ...]]] = {}

    def fit(linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
        features, now = args[0].shape[-1], maps.read_by(args[0])
        fits = features == linear.in_features
        what = f"{type(model).__name__} at {_text(size)}: the fully connected layer {names[linear]!r}"
        if known is None:
            if fits and (now is None or prod(now[1:]) == 1 or maps.fixed):
                return
            reads = (
                f"knows each pixel of the map {_told(now)} that it reads"
                if fits
                else f"would read {features} numbers and has weights for {linear.in_features}"
            )
            raise _Refused(
                f"{what} {reads}. Give the resolution of the training, resample_from=(C, H, W), to have these weights "
                "resampled, or take a network that ends in a global average pooling"
            )
        before = done.get(linear, known.get(linear))
        if fits and now == before:
            return
        if before is None or now is None or before[0] != now[0] or len(before) != 3 or linear in done:
            raise _Refused(
                f"{what} can't be resampled: it reads {_told(before)} there and {_told(now)} here, not maps [C, H, W] "
                "of the same channels"
            )
        if "weight" not in linear._parameters:
            raise _Refused(f"{what} can't be resampled: its weight is not a plain parameter (a parametrization)")
        last, fixed = maps.last, maps.fixed
        _resample_(linear, before, now)
        done[linear], maps.last, maps.fixed = now, last, fixed  # and no map of the resampling's own

    def note(layer: RoiLayer, *_: object) -> None:
        if layer.map_size is not None:
            sizes.setdefault(layer, set()).add(layer.map_size)

    handles = [layer.register_forward_hook(note) for layer in roi_layers(model).values()]
    try:
        with _watched(model) as maps:
            _run(model, size, fit, "")
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _told(read: tuple[int, ...] | None) -> str:
    return "no map" if read is None else _text(read)


def _run(model: nn.Module, size: tuple[int, ...], before_linear: Any, where: str) -> None:
    """One image of zeros through the network; `before_linear` is called before each fully connected layer."""
    handles = [
        module.register_forward_pre_hook(before_linear) for module in model.modules() if isinstance(module, nn.Linear)
    ]
    try:
        result = model(zeros_for(model, size))
        if isinstance(result, Tensor) and result.dim() and len(result) != 1:
            raise _Refused(
                f"{where}{type(model).__name__} gives {len(result)} outputs for one image of {_text(size)}: it reads "
                "parts of a map as images of their own, as view(-1, n) does; flatten(1) keeps images apart"
            )
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # the network's own kinds
        raise ValueError(
            f"{where}{type(model).__name__} can't take images of {_text(size)}: {first_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _resample_(linear: nn.Linear, before: tuple[int, ...], now: tuple[int, ...]) -> None:
    """Let a layer that reads maps of size `before` read those of size `now`, as if they were resampled to `before`."""
    channels, *sides = now
    weight = linear.weight
    pixels = torch.eye(prod(sides), dtype=torch.float64, device=weight.device).view(-1, 1, *sides)
    share = F.interpolate(pixels, before[1:], mode="bilinear", align_corners=False, antialias=True).flatten(1)
    made = weight.detach().double().unflatten(1, (channels, -1)) @ share.T
    linear.weight = nn.Parameter(made.flatten(1).to(weight.dtype), requires_grad=weight.requires_grad)
    linear.in_features = channels * prod(sides)
