"""A trained network at another resolution: its kernels' ROIs are parts of whatever map there is (Sec. 5)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tkn.app.messages import first_line
from tkn.evaluating import evaluating, zeros_for
from tkn.flattened import Flattened, MapSize
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
    than one pixel that is not of one size at all resolutions (an adaptive pooling's), without `resample_from`; for a
    resolution that the network can't take, at which it gives several outputs for one image, or at which the largest map
    of a layer is smaller than its `min_size`; for a plan, which is of one size.
    """
    size = _checked("input_size", input_size)
    trained = None if resample_from is None else _checked("resample_from", resample_from)
    model = copy.deepcopy(model)
    for layer in roi_layers(model).values():
        layer.map_size = None
    known = None if trained is None else _maps_read(model, trained, "resample_from: ")
    sizes = _fit_(model, size, known)
    for name, layer in roi_layers(model).items():
        maps = sizes.get(layer)
        if not maps:
            continue
        largest = max(maps, key=prod)
        if any(length < least for length, least in zip(largest, layer.min_size, strict=True)):
            raise ValueError(
                f"at {_text(size)} the maps of layer {name!r} have {_text(largest)} pixels, fewer than its "
                f"min_size={_text(layer.min_size)}: its ROIs can't stay what they are"
            )
        for map_size in maps:
            layer.project_(map_size)
    return model


def _checked(name: str, size: Sequence[int]) -> tuple[int, ...]:
    given = tuple(size) if isinstance(size, Sequence) else ()
    if len(given) not in (2, 3, 4) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given):
        raise ValueError(f"{name}={size!r} must be (channels, height, width), whole numbers of at least 1")
    return given


def _text(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


#: The ways round.
_HELP = (
    "Give the resolution of the training, resample_from=(C, H, W), to have these weights resampled, or take a network "
    "that ends in a global average pooling"
)


class _Refused(ValueError):
    """A message of this module's own, from within a pass of the network."""


def _maps_read(model: nn.Module, size: tuple[int, ...], where: str) -> dict[nn.Linear, tuple[MapSize, ...]]:
    """The maps that each fully connected layer reads on images of `size`; `where` begins the messages."""
    read: dict[nn.Linear, tuple[MapSize, ...]] = {}
    with Flattened() as flattened:

        def note(linear: nn.Linear, features: Tensor) -> None:
            read[linear] = flattened.maps_of(features)

        _run(model, size, note, where)
    return read


def _fit_(
    model: nn.Module, size: tuple[int, ...], known: dict[nn.Linear, tuple[MapSize, ...]] | None
) -> dict[RoiLayer, set[tuple[int, ...]]]:
    """Run the network on images of `size`; a fully connected layer that then reads another map than in `known` is
    resampled in place. Returns the sizes of all maps of each ROI layer that ran."""
    fitted: dict[nn.Linear, tuple[MapSize, ...]] = {}
    sizes: dict[RoiLayer, set[tuple[int, ...]]] = {}

    def fit(linear: nn.Linear, features: Tensor) -> None:
        now = flattened.maps_of(features)
        fits = features.shape[-1] == linear.in_features
        what = _called(model, size, linear)
        if known is None:
            if not fits:
                raise _Refused(
                    f"{what} would read {features.shape[-1]} numbers and has weights for {linear.in_features}. {_HELP}"
                )
            fitted[linear] = now
            return
        before = fitted.get(linear, known.get(linear, ()))
        if fits and _pixels(now) == _pixels(before):
            return
        if not len(before) == len(now) == 1 or before[0][0] != now[0][0] or len(before[0]) != 3 or linear in fitted:
            raise _Refused(
                f"{what} can't be resampled: it reads {_told(before)} there and {_told(now)} here, not maps [C, H, W] "
                "of the same channels"
            )
        if "weight" not in linear._parameters:
            raise _Refused(f"{what} can't be resampled: its weight is not a plain parameter (a parametrization)")
        _resample_(linear, before[0], now[0])
        fitted[linear] = now

    def note(layer: RoiLayer, *_: object) -> None:
        if layer.map_size is not None:
            sizes.setdefault(layer, set()).add(layer.map_size)

    handles = [layer.register_forward_hook(note) for layer in roi_layers(model).values()]
    try:
        with Flattened() as flattened:
            _run(model, size, fit, "")
    finally:
        for handle in handles:
            handle.remove()
    if known is None:
        _require_one_size(model, size, {linear: maps for linear, maps in fitted.items() if _pixels(maps)})
    return sizes


def _require_one_size(model: nn.Module, size: tuple[int, ...], read: dict[nn.Linear, tuple[MapSize, ...]]) -> None:
    """ValueError unless the maps that fully connected layers read are the same at any resolution, as after
    an adaptive pooling: whether a map is the one that a layer knows cannot be seen at one resolution."""
    if not read:
        return
    larger = (size[0], *(2 * length for length in size[1:]))
    with Flattened() as flattened:

        def compare(linear: nn.Linear, features: Tensor) -> None:
            if linear in read and flattened.maps_of(features) != read[linear]:
                known = f"knows each pixel of the map {_told(read[linear])} that it reads"
                raise _Refused(f"{_called(model, size, linear)} {known}. {_HELP}")

        map_sizes = {layer: layer.map_size for layer in roi_layers(model).values()}
        try:
            _run(model, larger, compare, "")
        except _Refused:
            raise
        except ValueError:
            pass  # it takes no larger images, and none of these layers is to blame
        for layer, map_size in map_sizes.items():
            layer.map_size = map_size


def _pixels(maps: tuple[MapSize, ...]) -> tuple[MapSize, ...]:
    """Those of more than one pixel."""
    return tuple(size for size in maps if prod(size[1:]) > 1)


def _called(model: nn.Module, size: tuple[int, ...], linear: nn.Linear) -> str:
    """What messages call a fully connected layer."""
    name = next(name for name, module in model.named_modules() if module is linear)
    return f"{type(model).__name__} at {_text(size)}: the fully connected layer {name!r}"


def _told(maps: tuple[MapSize, ...]) -> str:
    return " and ".join(map(_text, maps)) or "no map"


def _run(model: nn.Module, size: tuple[int, ...], reads: Callable[[nn.Linear, Tensor], None], where: str) -> None:
    """One image of zeros through the network; `reads` is called with each fully connected layer and what it reads.

    ValueError if the network can't take it, _Refused for more than one output of it.
    """

    def hook(linear: nn.Linear, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        reads(linear, args[0] if args else kwargs["input"])

    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with evaluating(model):
            result = model(zeros_for(model, size))
    except _Refused:
        raise
    except Exception as error:  # the network's own kinds
        raise ValueError(
            f"{where}{type(model).__name__} can't take images of {_text(size)}: {first_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(result, Tensor) and result.dim() == 2 and len(result) != 1:
        raise _Refused(
            f"{where}{type(model).__name__} gives {len(result)} rows of outputs for one image of {_text(size)}: it "
            "reads parts of a map as images of their own, as view(-1, n) does; flatten(1) keeps images apart"
        )


def _resample_(linear: nn.Linear, before: tuple[int, ...], now: tuple[int, ...]) -> None:
    """Let a layer that reads maps of size `before` read those of size `now`, as if they were resampled to `before`."""
    channels, *sides = now
    weight = linear.weight
    pixels = torch.eye(prod(sides), dtype=torch.float64, device=weight.device).view(-1, 1, *sides)
    share = F.interpolate(pixels, before[1:], mode="bilinear", align_corners=False, antialias=True).flatten(1)
    made = weight.detach().double().unflatten(1, (channels, -1)) @ share.T
    linear.weight = nn.Parameter(made.flatten(1).to(weight.dtype), requires_grad=weight.requires_grad)
    linear.in_features = channels * prod(sides)
