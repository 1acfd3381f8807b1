"""The multiply-adds inside a network's ROIs, kernel by kernel, as arithmetic of tensors: nothing waits for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tkn.adaptive import adaptive_layers
from tkn.attention import at_least_float32
from tkn.layers import RoiLayer, require_rectangles, roi_layers
from tkn.macs import LayerCount, count_macs, kernel_macs
from tkn.roi import axis_bounds, least_scale, projected_loc

#: Of a batch's images so many are counted, the first.
_IMAGES = 64


class RoiCount:
    """Counts as `count_macs` does, from loc and scale alone, which may be those that the network could have.

    loc and scale of all the network's kernels that learn their ROIs are one after the other in tensors [dims, K]:
    layers in the order of execution, those of fewer dimensions filled up with axes of one pixel. Frozen layers
    (`requires_grad` of their scale is False) count as they are. Adaptive layers count as their ROIs are in the images
    that were last seen (`see`), the mean over these; as the static ones before that.

    Args:
        model: the network; its layers stay, their loc and scale may change.
        input_size: of an image, (C, H, W).

    ValueError if `model` has no target layer that learns its ROIs, one whose ROIs are no single rectangles, or a frozen
    adaptive one.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, ...]) -> None:
        adaptive = adaptive_layers(model)
        require_rectangles(model, "a budget counts one rectangle for each kernel", but=adaptive)
        for name, layer in adaptive.items():
            if not layer.scale.requires_grad:
                raise ValueError(
                    f"the scale of layer {name!r} is frozen and its ROIs follow the image (adaptive): their "
                    "multiply-adds change with what finds them, and a budget could not hold them"
                )
        report = count_macs(model, input_size)
        named = {name: layer for name, layer in roi_layers(model).items() if layer.scale.requires_grad}
        rows = [row for row in report.target_layers if row.name in named]
        self.layers: list[RoiLayer] = [named[name] for name in dict.fromkeys(row.name for row in rows)]
        if not any(isinstance(layer, _ConvNd) for layer in self.layers):
            raise ValueError("the network has no target layers that learn: there is nothing that a budget could shrink")
        self.dims = max(layer.num_dims for layer in self.layers)
        self.kernels = [layer.num_kernels for layer in self.layers]
        #: multiply-adds of the dense network, as the ROIs are now, and of all whose ROIs do not learn
        self.dense, self.now = report.total_dense, report.total_roi
        self.fixed = report.total_roi - sum(row.macs_roi for row in rows)
        self._set_runs(rows, [named[row.name] for row in rows])
        self._adaptive = [layer for layer in adaptive.values() if layer in self.layers]
        #: how far kernels are moved in each image, and times how much scaled: [images, dims, K]
        self._moves: tuple[Tensor, Tensor] | None = None

    @property
    def of_images(self) -> bool:
        """Whether the count depends on the images."""
        return bool(self._adaptive)

    def see(self) -> None:
        """From now on count adaptive layers as in their last training pass, which was on the same images for all."""
        seen = {layer: layer.moves for layer in self._adaptive if layer.moves is not None}
        if not seen:
            return
        count = min(_IMAGES, *(len(move) for move, _ in seen.values()))

        def joined(index: int, neutral: float) -> Tensor:
            parts = []
            for layer, kernels in zip(self.layers, self.kernels, strict=True):
                part = layer.scale.new_full((count, self.dims, 1), neutral)
                if layer in seen:
                    part[:, : layer.num_dims, 0] = seen[layer][index][:count]
                parts.append(part.expand(-1, -1, kernels))
            return torch.cat(parts, dim=2)

        self._moves = joined(0, 0.0), joined(1, 1.0)

    def _set_runs(self, rows: Sequence[LayerCount], layers: Sequence[RoiLayer]) -> None:
        """What the count needs of every run of a layer; a layer may run twice, on maps of different sizes."""
        begins = {layer: sum(self.kernels[:index]) for index, layer in enumerate(self.layers)}
        kernels, sizes, costs = [], [], []
        #: the least scale, and the least part of the map's side that a ROI keeps: [dims, K]
        self.least_scale = torch.zeros(self.dims, sum(self.kernels), dtype=torch.float64)
        self.least_part = torch.zeros_like(self.least_scale)
        #: with every ROI the least, and the whole map
        self.least = self.most = self.fixed
        for row, layer in zip(rows, layers, strict=True):
            size = row.map_size + (1,) * (self.dims - layer.num_dims)
            least = [min(pair) for pair in zip(layer.min_size, row.map_size, strict=True)] + [1] * self.dims
            here = slice(begins[layer], begins[layer] + layer.num_kernels)
            for axis, length in enumerate(size):
                smallest = least_scale(least[axis], length, layer.scale.dtype)
                self.least_scale[axis, here].clamp_(min=min(1.0, smallest))
                self.least_part[axis, here].clamp_(min=least[axis] / length)
            kernels.append(torch.arange(here.start, here.stop))
            sizes.append(torch.tensor(size, dtype=torch.float64)[:, None].expand(-1, layer.num_kernels))
            per_pixel = kernel_macs(layer)
            costs.append(torch.full((layer.num_kernels,), float(per_pixel), dtype=torch.float64))
            self.least += per_pixel * layer.num_kernels * prod(least)
            self.most += per_pixel * layer.num_kernels * prod(row.map_size)
        self.run_kernels, self.run_sizes, self.run_costs = torch.cat(kernels), torch.cat(sizes, dim=1), torch.cat(costs)

    def to(self, device: torch.device) -> None:
        """Count on this device."""
        if self.run_costs.device != device:
            for name in ("least_scale", "least_part", "run_kernels", "run_sizes", "run_costs"):
                setattr(self, name, getattr(self, name).to(device))

    def loc(self) -> Tensor:
        """[dims, K], now."""
        return self._joined([layer.loc for layer in self.layers], 0.5)

    def scale(self) -> Tensor:
        """[dims, K], now."""
        return self._joined([layer.scale for layer in self.layers], 1.0)

    def scale_grad(self) -> Tensor:
        """The gradients of the scales, [dims, K]; zero where there are none."""
        scales = [layer.scale for layer in self.layers]
        return self._joined([torch.zeros_like(s) if s.grad is None else s.grad for s in scales], 0.0)

    def _joined(self, tensors: Sequence[Tensor], beyond: float) -> Tensor:
        filled = [F.pad(tensor.detach(), (0, 0, 0, self.dims - len(tensor)), value=beyond) for tensor in tensors]
        return torch.cat(filled, dim=1)

    @torch.no_grad()
    def set(self, loc: Tensor, scale: Tensor) -> None:
        """Give the layers these valid ones, [dims, K]."""
        for name, joined in (("loc", loc), ("scale", scale)):
            for layer, mine in zip(self.layers, joined.split(self.kernels, dim=1), strict=True):
                layer.get_parameter(name).copy_(mine[: layer.num_dims])
        for layer in self.layers:
            layer.note_projection()

    def projected(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest valid loc and scale, of the type of `loc` (Sec. 3.5): [..., dims, K]."""
        dtype = loc.dtype
        scale = scale.maximum(self.least_scale).clamp(max=1).to(dtype)
        held = projected_loc(at_least_float32(loc), at_least_float32(scale), self.least_part, dtype)
        return held.to(dtype), scale

    def macs(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Multiply-adds of every kernel for one image: [..., dims, K] -> float64 [..., K]."""
        if self._moves is None:
            return self._rectangles(loc, scale)
        move, factor = self._moves
        return self._rectangles(*self.projected(loc.unsqueeze(-3) + move, scale.unsqueeze(-3) * factor)).mean(dim=-2)

    def _rectangles(self, loc: Tensor, scale: Tensor) -> Tensor:
        loc, half = loc.double(), scale.double() / sqrt(2)
        lo, hi = axis_bounds(self.run_sizes, loc[..., self.run_kernels], half[..., self.run_kernels])
        costs = (hi - lo).prod(dim=-2) * self.run_costs
        return torch.zeros_like(loc[..., 0, :]).index_add(-1, self.run_kernels, costs)
