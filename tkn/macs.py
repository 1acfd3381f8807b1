"""Counting multiply-adds as the paper does, dense and inside the ROIs: one formula per layer type.

A convolution costs outputs x inputs x taps for every output pixel (borders at full price, bias free), a fully connected
layer (inputs + 1) x outputs, a batch normalisation one per element, and nothing else costs anything. With these the
paper's figures for its baselines come out exactly. The paper calls multiply-adds FLOPs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode

from tkn.adaptive import ImageRois
from tkn.evaluating import evaluating, zeros_for
from tkn.layers import RoiLayer, roi_layers
from tkn.locator import Locator


@dataclass(frozen=True)
class LayerCount:
    """One layer's multiply-adds for one image. `map_size` is the output's spatial size, () where it has none.

    macs_dense is what the dense layer costs that it stands for: one kernel for each output on the whole map, and
    nothing for what finds an adaptive layer's ROIs.
    """

    name: str
    kind: str
    map_size: tuple[int, ...]
    parameters: int
    macs_dense: int
    macs_roi: int
    #: mean over kernels of the ROI's sides in pixels, per axis; None for layers without ROIs
    mean_roi: tuple[float, ...] | None = None


@dataclass(frozen=True)
class MacsReport:
    """What a model costs for one image: a row per layer, in the order of execution."""

    layers: tuple[LayerCount, ...]
    #: parameters of the whole model, those of uncounted layers included
    parameters: int
    #: what the count does not know: "name (type)"; empty if the totals are complete
    unknown: tuple[str, ...]

    @property
    def total_dense(self) -> int:
        """Multiply-adds of the dense network that this one stands for."""
        return sum(layer.macs_dense for layer in self.layers)

    @property
    def total_roi(self) -> int:
        """Multiply-adds with every target layer computed inside its ROIs only."""
        return sum(layer.macs_roi for layer in self.layers)

    @property
    def targeted_share(self) -> float:
        """The part of `total_dense` that is in layers with ROIs: the most that these can save."""
        return sum(layer.macs_dense for layer in self.target_layers) / max(1, self.total_dense)

    @property
    def target_layers(self) -> tuple[LayerCount, ...]:
        """The rows of layers that have ROIs."""
        return tuple(layer for layer in self.layers if layer.mean_roi is not None)

    def __str__(self) -> str:
        rows = [("layer", "type", "map", "parameters", "MACs dense", "MACs ROI")]
        rows += [
            (
                layer.name or "(model)",
                layer.kind,
                "x".join(map(str, layer.map_size)),
                f"{layer.parameters:,}",
                f"{layer.macs_dense:,}",
                f"{layer.macs_roi:,}",
            )
            for layer in self.layers
        ]
        rows.append(("total", "", "", f"{self.parameters:,}", f"{self.total_dense:,}", f"{self.total_roi:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join(lines + [f"not counted: {name}" for name in self.unknown])


def kernel_macs(layer: nn.Module) -> int:
    """What one kernel of a convolution costs for one output pixel; 0 for a layer without, such as a regularization."""
    return layer.in_channels // layer.groups * prod(layer.kernel_size) if isinstance(layer, _ConvNd) else 0


def _convolution(layer: Any, output: Tensor) -> int:
    return layer.out_channels * kernel_macs(layer) * prod(output.shape[2:])


def _linear(layer: Any, output: Tensor) -> int:
    return (layer.in_features + 1) * layer.out_features * prod(output.shape[1:-1])


def _batch_norm(_layer: Any, output: Tensor) -> int:
    return output[0].numel()


_FORMULAS: dict[type[nn.Module], Callable[[Any, Tensor], int]] = {
    _ConvNd: _convolution,
    nn.Linear: _linear,
    _BatchNorm: _batch_norm,
}

#: Leaf modules that cost nothing by the paper's convention.
_FREE: tuple[type[nn.Module], ...] = (
    RoiLayer,
    nn.Sequential,  # an empty one: the identity
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    *(getattr(nn.modules.activation, name) for name in nn.modules.activation.__all__ if name != "MultiheadAttention"),
)

_aten = torch.ops.aten
#: Operations that multiply and add; seen outside a counted layer they are reported.
_MULTIPLYING = {
    _aten.convolution,
    _aten.convolution_overrideable,
    _aten.mm,
    _aten.addmm,
    _aten.bmm,
    _aten.baddbmm,
    _aten.addbmm,
    _aten.mv,
    _aten.addmv,
    _aten.dot,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_attention_math,
    _aten._scaled_dot_product_cudnn_attention,
    _aten._native_multi_head_attention,
    _aten._transformer_encoder_layer_fwd,
    _aten._trilinear,
    _aten.mkldnn_rnn_layer,
    _aten._cudnn_rnn,
    _aten.native_batch_norm,
    _aten._native_batch_norm_legit,
    _aten._native_batch_norm_legit_no_training,
    _aten.native_layer_norm,
    _aten.native_group_norm,
    torch.ops.tkn.target_conv,
    torch.ops.tkn.target_sequence,
}


def _formula(module: nn.Module) -> Callable[[Any, Tensor], int] | None:
    if isinstance(module, _ConvTransposeNd):
        return None
    return next((formula for kind, formula in _FORMULAS.items() if isinstance(module, kind)), None)


def _count(name: str, module: nn.Module, output: Tensor, seen: ImageRois | None) -> LayerCount:
    formula = _formula(module)
    dense = formula(module, output) if formula else 0
    roi, mean_roi, map_size = dense, None, () if isinstance(module, nn.Linear) else tuple(output.shape[2:])
    if isinstance(module, RoiLayer):
        map_size = tuple(output.shape[-module.num_dims :])
        rois = module.rois(map_size)
        mean_roi = tuple((rois[..., 1] - rois[..., 0]).cpu().double().mean(dim=0).tolist())
        pixels = None
        if seen is not None:
            mean_roi, pixels = seen.sides(name, map_size) or mean_roi, seen.pixels(name, map_size)
        if isinstance(module, _ConvNd):
            roi = round(kernel_macs(module) * (int(module.areas(map_size).sum()) if pixels is None else pixels))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return LayerCount(name, type(module).__name__, map_size, parameters, dense, roi, mean_roi)


class _Counter(TorchDispatchMode):
    """Counts layers as they run, and notes multiplying operations that run outside of a counted layer."""

    def __init__(self, model: nn.Module, seen: ImageRois | None) -> None:
        super().__init__()
        self.seen = seen
        self.names = {module: name for name, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.rows: list[LayerCount] = []
        self.unknown: dict[str, None] = {}  # an ordered set

    def note(self, what: str) -> None:
        where = self.names.get(self.running[-1], "") if self.running else ""
        self.unknown[f"{where or '(model)'} ({what})"] = None

    def before(self, module: nn.Module, _args: object) -> None:
        self.running.append(module)

    def after(self, module: nn.Module, _args: object, output: object) -> None:
        leaf = next(module.children(), None) is None
        formula = _formula(module)
        if (formula or isinstance(module, RoiLayer)) and isinstance(output, Tensor):
            row = _count(self.names[module], module, output, self.seen)
            finds_rois = any(isinstance(parent, Locator) for parent in self.running)
            self.rows.append(replace(row, macs_dense=0) if finds_rois else row)
        # A user's subclass may return more than a tensor.
        elif formula or (leaf and not isinstance(module, _FREE) and type(module).__module__.startswith("torch.")):
            self.note(type(module).__name__)
        self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside_counted = any(_formula(module) for module in self.running)
        if func.overloadpacket in _MULTIPLYING and not inside_counted:
            self.note(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def _hooked(model: nn.Module, counter: _Counter) -> Iterator[None]:
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(counter.before))
        handles.append(module.register_forward_hook(counter.after))
    try:
        with evaluating(model), counter:
            yield
    finally:
        for handle in handles:
            handle.remove()


def count_macs(model: nn.Module, input_size: tuple[int, ...], rois: ImageRois | None = None) -> MacsReport:
    """Count a model's multiply-adds for one image of `input_size` (C, H, W), and its parameters.

    `rois`: of adaptive layers, the mean over the images that they have seen; without them their static ROIs.

    Runs the model once, in evaluation mode, on an image of zeros; the model is left as it was. A layer that runs twice
    counts twice. Layers and matrix products that have no formula here are listed in `unknown`, with a UserWarning: the
    totals leave them out. Elementwise products cost nothing, as in the paper. ValueError if loc and scale have no
    values, on the meta device or in a FakeTensorMode.
    """
    for name, layer in roi_layers(model).items():
        if layer.loc.is_meta or isinstance(layer.loc, FakeTensor):
            raise ValueError(
                f"the multiply-adds of layer {name!r} depend on its loc and scale, which have no values here"
            )
    counter = _Counter(model, rois)
    with _hooked(model, counter):
        model(zeros_for(model, input_size))
    if counter.unknown:
        warnings.warn(f"multiply-adds not counted: {', '.join(counter.unknown)}", stacklevel=2)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return MacsReport(tuple(counter.rows), parameters, tuple(counter.unknown))
