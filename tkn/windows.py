"""The window of a target layer inside its ROIs, kept while its parameters stay, and its gradients in formulas."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tkn.attention import attention_function, attention_slope, pixel_centres, separable_window
from tkn.kept import Kept, content
from tkn.moving import MARGIN, outer_bounds
from tkn.roi import roi_areas, roi_bounds, roi_mask
from tkn.spec import Target
from tkn.tracing import transformed

#: Of parameters that stay, bytes: making a window takes longer than a small layer.
_made = Kept(64 * 2**20)


def target_window(target: Target, size: tuple[int, ...]) -> Tensor:
    """The layer's window on maps of `size`, zero outside the ROIs if it clips: [O, *size], or [B, O, *size]."""
    loc, scale = _flat(target.loc), _flat(target.scale)
    window = separable_window(size, loc, scale, attention_function(target.spec.attention), target.spec.scale_unit)
    if target.spec.clip:
        # Not a product: what is no number in a broken loc or scale must not spread.
        window = torch.where(roi_mask(size, roi_bounds(size, loc, scale)), window, 0.0)
    return window.unflatten(0, (len(target.loc), -1)) if target.per_image else window


def _flat(parameter: Tensor) -> Tensor:
    """loc or scale [B, dims, O] as [dims, B * O]; those of all images together as they are."""
    return parameter if parameter.dim() == 2 else parameter.transpose(0, 1).flatten(1)


def kept_window(target: Target, size: tuple[int, ...], dtype: torch.dtype, *, masked: bool = True) -> Tensor:
    """The window in `dtype`, `masked` as `target_window` has it or without zeros outside the ROIs: without gradients,
    and for `readable` loc and scale the same tensor again while they hold the same numbers."""
    spec = target.spec
    clip = spec.clip and masked
    if target.loc.device.type != "cpu":
        return target_window(replace(target, spec=replace(spec, clip=clip)), size).to(dtype)
    key = (size, dtype, spec.attention, spec.scale_unit, clip, *content(target.loc, target.scale))

    def make() -> Tensor:
        # Not a tensor of inference mode: those could not be saved for a backward pass.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            loc, scale = target.loc.detach().clone(), target.scale.detach().clone()
            copied = Target(replace(spec, clip=clip), target.weight, None, loc, scale)
            return target_window(copied, size).to(dtype)

    return _made.get(key, make, lambda window: window.numel() * window.itemsize)


@dataclass(frozen=True)
class Bounds:
    """Pixels that hold every kernel's ROI: int64 [O, dims, 2], their bytes, and how many pixels they are."""

    rois: Tensor
    key: bytes
    area: int


def kept_bounds(target: Target, size: tuple[int, ...]) -> Bounds | None:
    """The ROIs on maps of `size`, the same object again while loc and scale stay; None: all is inside.

    On a GPU, which is waited for: bounds that hold the ROIs, the same object while they do.
    """
    if not target.spec.clip:
        return None
    if is_far(target.loc):
        outer = outer_bounds(size, target.loc, target.scale, margin=MARGIN if learns(target) else 0)
        return Bounds(outer.rois, outer.key, outer.area)

    def make() -> Bounds:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            rois = roi_bounds(size, target.loc.detach().clone(), target.scale.detach().clone())
            return Bounds(rois, rois.numpy().tobytes(), int(roi_areas(rois).sum()))

    return _made.get(("bounds", size, *content(target.loc, target.scale)), make, lambda bounds: 2 * len(bounds.key))


def is_far(tensor: Tensor) -> bool:
    """Whether reading a tensor's numbers waits for a device."""
    return tensor.device.type != "cpu"


def learns(target: Target) -> bool:
    """Whether the layer's ROIs may move."""
    return target.loc.requires_grad or target.scale.requires_grad


def readable(target: Target) -> bool:
    """Whether the numbers of loc and scale are there to be read, and nothing records what is computed of them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return False
    plain = (type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in (target.loc, target.scale))
    return torch._C._len_torch_dispatch_stack() == 0 and all(plain)


def window_gradients(target: Target, size: tuple[int, ...], grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of loc and scale, from the gradient of the window inside the ROIs.

    grad [O, *size], or [B, O, *size] where loc and scale are of each image; both results in the shape of loc. With
    z = (x - loc) / (u scale) (Eqs. 6, 7) the window is the product of f(z) over the axes (Eq. 13).
    """
    loc, scale = (_flat(t.detach()).to(grad.dtype) for t in (target.loc, target.scale))
    grad = grad.reshape(-1, *size)
    function, unit = attention_function(target.spec.attention), target.spec.scale_unit
    axes, slopes, z_of = [], [], []
    for axis, length in enumerate(size):
        z = (pixel_centres(length, loc) - loc[axis, :, None]) / (unit * scale[axis, :, None])
        value = function(z)
        axes.append(value)
        slopes.append(attention_slope(target.spec.attention, z, value))
        z_of.append(z)
    grad_loc, grad_scale = torch.empty_like(loc), torch.empty_like(scale)
    letters = "abc"[: len(size)]
    for axis in range(len(size)):
        others = [f"n{letter}" for letter in letters if letter != letters[axis]]
        factors = [value for other, value in enumerate(axes) if other != axis]
        along = torch.einsum(",".join([f"n{letters}", *others]) + f"->n{letters[axis]}", grad, *factors)
        along = along * slopes[axis]
        grad_loc[axis] = -along.sum(1) / (unit * scale[axis])
        grad_scale[axis] = -(along * z_of[axis]).sum(1) / scale[axis]
    return _unflat(grad_loc, target.loc), _unflat(grad_scale, target.scale)


def _unflat(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient [dims, B * O] in the shape and type of loc or scale."""
    if parameter.dim() == 3:
        grad = grad.unflatten(1, (len(parameter), -1)).transpose(0, 1)
    return grad.to(parameter.dtype)
