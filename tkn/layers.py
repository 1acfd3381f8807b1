"""The layers of a Targeted Kernel Network: attentive regularization (Eq. 14) and target layers (Eqs. 16, 17)."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fusion

from tkn.attention import at_least_float32, attention_function, correlated_gaussian_window, separable_window
from tkn.backends.torch.fourier import uses_fourier
from tkn.backends.torch.weigh import weigh
from tkn.geometry import Pool
from tkn.ops.eager import explain
from tkn.ops.engines import FOURIER, Engine, check_engine
from tkn.ops.operator import by_torch
from tkn.ops.reference import reference
from tkn.passes import RemembersPasses
from tkn.roi import project_, roi_areas, roi_bounds, roi_mask
from tkn.spec import Target, TargetSpec

MinSize = int | Literal["kernel"]

#: Where loc and scale start: every ROI is the whole map (Sec. 3.4).
_WHOLE_MAP = {"loc": 0.5, "scale": 1.0}


class RoiLayer(RemembersPasses, nn.Module):
    """A layer whose kernels each have a ROI: loc and scale, and the windows, ROIs and projection that follow.

    The base of all layers below; `block` says which power of beta multiplies the layer's scale penalty.
    """

    num_dims: int
    block: int
    loc: nn.Parameter
    scale: nn.Parameter
    training: bool
    #: what keeps each kernel from having one rectangle, the same in every image; None: it has
    other_rois: str | None = None

    def _init_attention(
        self,
        channels: int,
        attention: str,
        scale_unit: float,
        min_size: tuple[int, ...],
        clip: bool,
        block: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if not scale_unit > 0:
            raise ValueError(f"scale_unit={scale_unit} must be positive")
        if any(isinstance(least, bool) or not isinstance(least, int) or least < 1 for least in min_size):
            kernel = "'kernel' or " if isinstance(self, TargetConvNd) else ""
            raise ValueError(f"min_size={min_size[0]!r} must be {kernel}a whole number of pixels, at least 1")
        if block < 0:
            raise ValueError(f"block={block} must not be negative")
        self.attention_function = attention_function(attention)
        self.attention = attention
        self.scale_unit = scale_unit
        self.min_size = min_size
        self.clip = clip
        self.block = block
        self._register_attention(channels, device, dtype)

    def _register_attention(self, channels: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        for name, value in _WHOLE_MAP.items():
            start = torch.full((self.num_dims, channels), value, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(start))

    @property
    def num_kernels(self) -> int:
        """C: how many windows and ROIs the layer has."""
        raise NotImplementedError

    def reset_attention(self) -> None:
        """loc = 0.5, scale = 1: every ROI is the whole map (Sec. 3.4)."""
        for name, value in _WHOLE_MAP.items():
            nn.init.constant_(self.get_parameter(name), value)

    def no_weight_decay(self) -> set[str]:
        """The names of the layer's parameters that weight decay must leave alone: the scale penalty is theirs."""
        return set(_WHOLE_MAP)

    def window(self, size: tuple[int, ...]) -> Tensor:
        """The attention maps F_att (Eq. 13) on a map of spatial size `size`, before clipping: [C, *size].

        In float64 if loc and scale are, else in float32, also for parameters of half precision.
        """
        size = self._checked_size(size)
        return separable_window(size, self.loc, self.scale, self.attention_function, self.scale_unit)

    def rois(self, size: tuple[int, ...]) -> Tensor:
        """Every kernel's ROI (Eq. 15) on a map of spatial size `size`: int64 [C, dims, 2], (lo, hi) half-open."""
        return roi_bounds(self._checked_size(size), self.loc, self.scale)

    def areas(self, size: tuple[int, ...]) -> Tensor:
        """The pixels inside each output channel's ROI on a map of spatial size `size`: int64 [C]."""
        return roi_areas(self.rois(size))

    def squared_scales(self) -> Tensor:
        """What the scale penalty sums: [dims, C], in float64 if the scales are, else in float32."""
        # In half precision a sum would hide what many scales lose in a step.
        return at_least_float32(self.scale).square()

    def project_(self, size: tuple[int, ...]) -> None:
        """Clip loc and scale in place for maps of spatial size `size` (Sec. 3.5); call it after an optimiser's step.

        Along an axis shorter than min_size the ROIs stay the whole axis.
        """
        project_(self._checked_size(size), self.loc, self.scale, self.min_size)
        self.note_projection()

    def _checked_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        size = tuple(size)
        if len(size) != self.num_dims or min(size) < 1:
            raise ValueError(f"size={size} must have {self.num_dims} positive numbers for {type(self).__name__}")
        loc, scale, shape = self.loc, self.scale, (self.num_dims, self.num_kernels)
        if not (
            loc.shape == scale.shape == shape
            and loc.dtype == scale.dtype
            and loc.device == scale.device
            and loc.is_floating_point()
        ):
            raise ValueError(
                f"loc and scale of {type(self).__name__} must be of shape {list(shape)}, of one floating-point type "
                f"and on one device: loc is {list(loc.shape)}, {loc.dtype} on {loc.device}, "
                f"scale {list(scale.shape)}, {scale.dtype} on {scale.device}"
            )
        return size

    def _learned_with(self) -> dict[str, Any]:
        """What gives loc and scale their meaning: it travels in the metadata of state dicts."""
        return {"attention": self.attention, "scale_unit": self.scale_unit}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Not a dict of the user's own, which holds tensors alone.
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {}).update(self._learned_with())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = self._learned_with()
        theirs = {key: local_metadata[key] for key in ours if key in local_metadata}
        if theirs.items() <= ours.items():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        else:
            of_theirs, of_ours = (", ".join(f"{k}={v}" for k, v in side.items()) for side in (theirs, ours))
            error_msgs.append(f"{prefix}loc and scale were learned with {of_theirs}, not {of_ours}")

    def _weigh(self, activation: Tensor) -> Tensor:
        """Activation [B, C, *size] or [C, *size] times the window, zero outside the ROIs if `clip`."""
        size = tuple(activation.shape[-self.num_dims :])
        window = self.window(size)
        if self.clip:
            window = torch.where(roi_mask(size, self.rois(size)), window, 0.0)
        return weigh(activation, window.to(activation.dtype))

    def _attention_repr(self) -> str:
        least = self.min_size[0] if len(set(self.min_size)) == 1 else self.min_size
        return (
            f"attention={self.attention}, scale_unit={self.scale_unit}, min_size={least}, "
            f"clip={self.clip}, block={self.block}"
        )


class _AttentiveRegularization(RoiLayer):
    def __init__(
        self,
        num_channels: int,
        *,
        attention: str = "cauchy",
        scale_unit: float = 0.5,
        min_size: int = 3,
        clip: bool = False,
        block: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        least = (min_size,) * self.num_dims
        self._init_attention(num_channels, attention, scale_unit, least, clip, block, device, dtype)

    @property
    def num_kernels(self) -> int:
        return self.num_channels

    def reset_parameters(self) -> None:
        """As `reset_attention`: the layer has no other parameters."""
        self.reset_attention()

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (self.num_dims + 1, self.num_dims + 2) or input.shape[-1 - self.num_dims] != (
            self.num_channels
        ):
            axes = ", ".join("DHW"[-self.num_dims :])
            raise ValueError(
                f"input of shape {list(input.shape)} is not [B, C, {axes}] or [C, {axes}] with C = {self.num_channels}"
            )
        self.note_pass(tuple(input.shape[-self.num_dims :]))
        return self._weigh(input)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, {self._attention_repr()}"


class AttentiveRegularization1d(_AttentiveRegularization):
    """Multiplies each channel of an activation [B, C, L] by its attention window (Eq. 1).

    Args:
        num_channels: C.
        attention: "cauchy" (Eq. 3), "gaussian" (Eq. 2) or "flat", 1 inside and soft at the ROI's edge.
        scale_unit: the window is f((x - loc) / (scale_unit * scale)), x, loc and scale in fractions of the side.
        min_size: pixels of the ROI's side that `project_` keeps, where the map has as many.
        clip: zero outside the ROI (Sec. 3.5) instead of the soft window alone.
        block: which power of beta multiplies this layer's scale penalty.
        device, dtype: of the parameters.

    `loc` and `scale` have shape [dims, C].
    """

    num_dims = 1


class AttentiveRegularization2d(_AttentiveRegularization):
    """Multiplies each channel of an activation [B, C, H, W] by its attention map F_att (Eq. 14).

    Args as in `AttentiveRegularization1d`, and:
        rho: the correlation of Eqs. 4-5 (Gaussian only), within (-1, 1); 0 is the separable window.
        learn_rho: make `rho` a parameter [C] (started at `rho`), as in the paper's first experiments.
    """

    num_dims = 2
    rho: Tensor | None

    def __init__(
        self,
        num_channels: int,
        *,
        attention: str = "cauchy",
        scale_unit: float = 0.5,
        min_size: int = 3,
        clip: bool = False,
        block: int = 0,
        rho: float = 0.0,
        learn_rho: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_channels,
            attention=attention,
            scale_unit=scale_unit,
            min_size=min_size,
            clip=clip,
            block=block,
            device=device,
            dtype=dtype,
        )
        if not -1 < rho < 1:
            raise ValueError(f"rho={rho} must lie within (-1, 1)")
        if (rho or learn_rho) and attention != "gaussian":
            raise ValueError(f"rho is defined for attention='gaussian' only (Eqs. 4, 5), not for {attention!r}")
        self.initial_rho = float(rho)
        start = torch.full((num_channels,), self.initial_rho, device=device, dtype=dtype)
        if learn_rho:
            self.rho = nn.Parameter(start)
        elif rho:
            self.register_buffer("rho", start)
        else:
            self.rho = None

    def reset_attention(self) -> None:
        """loc = 0.5, scale = 1, and `rho` as it was given."""
        super().reset_attention()
        if self.rho is not None:
            nn.init.constant_(self.rho, self.initial_rho)

    def no_weight_decay(self) -> set[str]:
        """The names of the layer's parameters that weight decay must leave alone: loc, scale and a learned rho."""
        return super().no_weight_decay() | ({"rho"} if isinstance(self.rho, nn.Parameter) else set())

    def window(self, size: tuple[int, ...]) -> Tensor:
        """The attention maps F_att on a map of spatial size (H, W), before clipping: [C, H, W]."""
        if self.rho is None:
            return super().window(size)
        height, width = self._checked_size(size)
        return correlated_gaussian_window((height, width), self.loc, self.scale, self.rho, self.scale_unit)

    def project_(self, size: tuple[int, ...]) -> None:
        super().project_(size)
        if isinstance(self.rho, nn.Parameter):
            # Beyond 1 the form of Eq. 5 is indefinite and the window grows without bound.
            with torch.no_grad():
                self.rho.clamp_(-0.99, 0.99)


class AttentiveRegularization3d(_AttentiveRegularization):
    """Multiplies each channel of an activation [B, C, D, H, W] by its window; args as in `AttentiveRegularization1d`.

    The paper's Sec. 3.4: linearly separable windows along each dimension.
    """

    num_dims = 3


class TargetConvNd(RoiLayer):
    """The attention half of a layer that convolves; the concrete classes add torch's as their other base."""

    kernel_size: tuple[int, ...]
    out_channels: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any
    weight: Tensor
    bias: Tensor | None
    _reversed_padding_repeated_twice: list[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        attention: str = "cauchy",
        scale_unit: float = 0.5,
        min_size: MinSize = 3,
        clip: bool = True,
        block: int = 0,
        engine: Engine = "auto",
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        least = self.kernel_size if min_size == "kernel" else (min_size,) * self.num_dims
        self._init_attention(out_channels, attention, scale_unit, least, clip, block, device, dtype)
        self.engine = check_engine(engine)

    @property
    def num_kernels(self) -> int:
        return self.out_channels

    def reset_parameters(self) -> None:
        """Weight and bias as torch's convolutions start, and every ROI the whole map."""
        super().reset_parameters()  # type: ignore[misc]  # the concrete classes' other base has it
        # torch calls it before loc and scale are there.
        if "scale" in self._parameters:
            self.reset_attention()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A dense convolution's weights: every ROI is the whole map.
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and not any(prefix + name in state_dict for name in _WHOLE_MAP):
            for name, start in self._start(weight).items():
                state_dict[prefix + name] = start
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _start(self, like: Tensor) -> dict[str, Tensor]:
        """loc and scale as they start, of the type of `like`."""
        shape = self.num_dims, self.num_kernels
        return {name: like.new_full(shape, value) for name, value in _WHOLE_MAP.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.nn.utils.fuse_conv_bn_eval would put a batch normalisation before the window instead of after it. Only
        # the caller tells its assignment from any other.
        if name == "weight" and sys._getframe(1).f_globals.get("__name__") == fusion.__name__:
            raise ValueError(
                f"a {type(self).__name__} can't be fused with the batch normalisation after it: "
                "its window comes between the two"
            )
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        output = self._convolved(input)
        if isinstance(output, Tensor):  # not what a tracer hands on
            self.note_pass(tuple(output.shape[-self.num_dims :]))
        return output

    def _convolved(self, input: Tensor) -> Tensor:
        engine = self.operator_engine()
        if by_torch(engine, input):
            return self._dense(input)
        return torch.ops.tkn.target_conv(
            self.padded(input),
            self.weight,
            self.bias,
            self.loc,
            self.scale,
            self.attention,
            self.scale_unit,
            self.clip,
            self.stride,
            self._zeros(),
            self.dilation,
            self.groups,
            engine,
        )

    def dense(self, input: Tensor) -> Tensor:
        """The whole map's convolution, times the window, zero outside the ROIs if `clip`: what any engine gives."""
        return self._dense(input)

    def _dense(self, input: Tensor) -> Tensor:
        return reference(self.padded(input), (self.target(),), fourier=uses_fourier(self))

    def why(self, input: Tensor) -> str:
        """Which engine would compute `input` now, and why: "roi", or "dense: " and a reason."""
        return explain(self.padded(input), self.target(), self.operator_engine())

    def padded(self, input: Tensor) -> Tensor:
        """The input with the padding of a `padding_mode` other than "zeros" around it."""
        if self.padding_mode == "zeros":
            return input
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)

    def target(self, *, relu: bool = False, pool: Pool | None = None) -> Target:
        """The layer as its operator takes it, with the ReLU and the pooling after it."""
        zeros = self._zeros()
        padding = tuple(zip(zeros[::2], zeros[1::2], strict=True))
        attention = self.attention, self.scale_unit, self.clip
        spec = TargetSpec(*attention, self.stride, padding, self.dilation, self.groups, relu, pool)
        return Target(spec, self.weight, self.bias, self.loc, self.scale)

    def _zeros(self) -> list[int]:
        """The operator's padding: zeros before and after the first axis, then the next."""
        if self.padding_mode != "zeros":
            return [0] * 2 * self.num_dims
        around = self._reversed_padding_repeated_twice  # of the last axis first
        return [zeros for axis in range(len(around) - 2, -1, -2) for zeros in around[axis : axis + 2]]

    def operator_engine(self) -> str:
        """The operator's `engine`: the layer's, and whether dense convolutions may be in the frequency domain."""
        return self.engine + FOURIER if uses_fourier(self) else self.engine

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._attention_repr()}, engine={self.engine}"


class TargetConv1d(TargetConvNd, nn.Conv1d):
    """`TargetConv2d` in one dimension: [B, Cin, L] -> [B, Cout, L']; the same arguments."""

    num_dims = 1


class TargetConv2d(TargetConvNd, nn.Conv2d):
    """A target layer (Eqs. 16, 17): convolution, times the kernel's window, zero outside its ROI.

    Takes the place of `nn.Conv2d`: the same arguments in the same order (so padding is 0 by default, while the paper
    pads to keep the size), the same `weight` and `bias`. [B, Cin, H, W] -> [B, Cout, H', W']. The convolution sees the
    input's real values across the ROI's border.

    Args beyond the convolution's:
        attention: "cauchy" (Eq. 3), "gaussian" (Eq. 2) or "flat", 1 inside and soft at the ROI's edge.
        scale_unit: the window is f((x - loc) / (scale_unit * scale)), x, loc and scale in fractions of the side.
        min_size: pixels of the ROI's side that `project_` keeps, where the map has as many; "kernel" is the kernel's
            own size.
        clip: zero outside the ROI; False leaves the soft window alone.
        block: which power of beta multiplies this layer's scale penalty: 0, 1, 2 for Convolution (1), (2), (3).
        engine: what computes it. "dense": torch's convolution, then the mask. "roi": inside the ROIs only, forward and
            backward, on the CPU, on a GPU in two dimensions (elsewhere a ValueError). "auto": the faster by estimate,
            or as `tkn.tune` measured it; "dense" wherever "roi" can't compute. `why` says which, and the reason.

    `loc` and `scale` have shape [dims, Cout]. ValueError for impossible arguments.
    """

    num_dims = 2


class TargetConv3d(TargetConvNd, nn.Conv3d):
    """`TargetConv2d` in three dimensions: [B, Cin, D, H, W] -> [B, Cout, D', H', W']; the same arguments."""

    num_dims = 3


def require_rectangles(model: nn.Module, what: str, but: Container[str] = ()) -> None:
    """ValueError for a layer whose kernels have other ROIs than one rectangle for all images; `what` can't have it.

    `but`: names of layers that it can have.
    """
    for name, layer in roi_layers(model).items():
        if layer.other_rois is not None and name not in but:
            raise ValueError(f"{what}: layer {name!r} is a {type(layer).__name__}, {layer.other_rois}")


def roi_layers(model: nn.Module) -> dict[str, RoiLayer]:
    """The model's target and attentive-regularization layers by name, in the order of their definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoiLayer)}


@contextmanager
def clipped(model: nn.Module) -> Iterator[None]:
    """Within the context every ROI layer of `model` is zero outside its ROIs, whatever its `clip`."""
    layers = roi_layers(model).values()
    before = [layer.clip for layer in layers]
    try:
        for layer in layers:
            layer.clip = True
        yield
    finally:
        for layer, clip in zip(layers, before, strict=True):
            layer.clip = clip
