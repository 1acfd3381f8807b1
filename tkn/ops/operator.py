"""The operators `torch.ops.tkn.target_conv` and `target_sequence`: target layers as torch's tools see them.

In plain eager code their autograd kernel runs the layers directly (eager.py). Where torch watches what is computed (it
traces, compiles, exports, counts, fakes) an operator stays one opaque operation: without gradients itself, with
gradients a pair `target_forward` and `target_backward`, whose results have shapes that are known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tkn.ops import eager, flops, watched
from tkn.ops.engines import may_choose, split_engine
from tkn.ops.reference import reference
from tkn.spec import Target, decode, encode, spec_of
from tkn.tracing import transformed

_CONV = """target_conv(Tensor x, Tensor weight, Tensor? bias, Tensor loc, Tensor scale, str attention, float scale_unit,
    bool clip, int[] stride, int[] padding, int[] dilation, int groups, str engine) -> Tensor"""
_SEQUENCE = "target_sequence(Tensor x, Tensor[] tensors, str layers, float[] scale_units, str engine) -> Tensor"
_FORWARD = """target_forward(Tensor x, Tensor[] tensors, str layers, float[] scale_units, str engine)
    -> (Tensor, Tensor)"""
_BACKWARD = """target_backward(Tensor grad, Tensor x, Tensor[] tensors, Tensor room, str layers, float[] scale_units,
    str engine, bool[] needs) -> Tensor[]"""

library = torch.library.Library("tkn", "DEF")
# What the compiler captures as CUDA graphs leaves them out: they may look at the ROIs, for which the host waits.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
for _schema in (_CONV, _SEQUENCE, _FORWARD, _BACKWARD):
    library.define(" ".join(_schema.split()), tags=_TAGS)


def check_tensors(x: Tensor, targets: Sequence[Target]) -> None:
    """ValueError for tensors that do not go together: other devices, wrong shapes."""
    for target in targets:
        outputs, dims = target.weight.shape[0], target.spec.dims
        for name, tensor in (
            ("weight", target.weight),
            ("bias", target.bias),
            ("loc", target.loc),
            ("scale", target.scale),
        ):
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}, the input on {x.device}")
        if target.weight.dim() != dims + 2:
            raise ValueError(f"weight of shape {list(target.weight.shape)} is none of {dims} spatial dimensions")
        for name, tensor in (("loc", target.loc), ("scale", target.scale)):
            of_all = tensor.shape == (dims, outputs)
            of_each = tensor.dim() == 3 and tensor.shape[1:] == (dims, outputs) and tensor.shape[0] == x.shape[0]
            if not (of_all or of_each) or tensor.shape != target.loc.shape:
                raise ValueError(
                    f"{name} of shape {list(tensor.shape)} must be [{dims}, {outputs}], or that of each image"
                )


def _one(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    attention: str,
    scale_unit: float,
    clip: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    engine: str,
) -> tuple[Tensor, tuple[Target, ...], str]:
    spec = spec_of(attention, scale_unit, clip, stride, padding, dilation, groups)
    return x, (Target(spec, weight, bias, loc, scale),), engine


def _many(
    x: Tensor, tensors: Sequence[Tensor], layers: str, scale_units: Sequence[float], engine: str
) -> tuple[Tensor, tuple[Target, ...], str]:
    return x, decode(tensors, layers, scale_units), engine


def _with_autograd(arguments: Callable[..., tuple[Tensor, tuple[Target, ...], str]]) -> Callable[..., Tensor]:
    """The operator's autograd kernel."""

    def kernel(*args: Any) -> Tensor:
        x, targets, engine = arguments(*args)
        check_tensors(x, targets)
        if transformed():
            return reference(x, targets)
        if _plain(x, targets):
            return eager.run(x, targets, engine)
        split_engine(engine)
        return watched.run(x, targets, engine)

    return kernel


def _plain(x: Tensor, targets: Sequence[Target]) -> bool:
    """Whether nothing but autograd watches what is computed of these tensors."""
    tensors = (x, *(t for target in targets for t in target.tensors))
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        type(t) in (Tensor, nn.Parameter, nn.Buffer) for t in tensors
    )


def _without_autograd(arguments: Callable[..., tuple[Tensor, tuple[Target, ...], str]]) -> Callable[..., Tensor]:
    """The operator's kernel below autograd: for compiled programs, counters, inference mode."""

    def kernel(*args: Any) -> Tensor:
        x, targets, engine = arguments(*args)
        check_tensors(x, targets)
        with torch.no_grad():
            return watched.in_layout(eager.run(x, targets, engine), x, targets)

    return kernel


def _fake(arguments: Callable[..., tuple[Tensor, tuple[Target, ...], str]]) -> Callable[..., Tensor]:
    def kernel(*args: Any) -> Tensor:
        x, targets, _ = arguments(*args)
        return watched.empty_result(x, targets)

    return kernel


for _name, _arguments in (("target_conv", _one), ("target_sequence", _many)):
    library.impl(_name, _with_autograd(_arguments), "Autograd")
    library.impl(_name, _without_autograd(_arguments), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tkn::{_name}", _fake(_arguments), lib=library)


def _forward(
    x: Tensor, tensors: Sequence[Tensor], layers: str, scale_units: Sequence[float], engine: str
) -> tuple[Tensor, Tensor]:
    return watched.forward(x, decode(tensors, layers, scale_units), engine)


def _backward(
    grad: Tensor,
    x: Tensor,
    tensors: Sequence[Tensor],
    room: Tensor,
    layers: str,
    scale_units: Sequence[float],
    engine: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    return watched.backward(grad, x, room, decode(tensors, layers, scale_units), engine, needs)


def _fake_forward(
    x: Tensor, tensors: Sequence[Tensor], layers: str, scale_units: Sequence[float], _engine: str
) -> tuple[Tensor, Tensor]:
    targets = decode(tensors, layers, scale_units)
    return watched.empty_result(x, targets), watched.empty_room(x, targets)


def _fake_backward(
    _grad: Tensor,
    x: Tensor,
    tensors: Sequence[Tensor],
    _room: Tensor,
    _layers: str,
    _scale_units: Sequence[float],
    _engine: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    return [torch.empty_like(t) for t, needed in zip((x, *tensors), needs, strict=True) if needed]


library.impl("target_forward", _forward, "CompositeExplicitAutograd")
library.impl("target_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("tkn::target_forward", _fake_forward, lib=library)
torch.library.register_fake("tkn::target_backward", _fake_backward, lib=library)


flops.register()


def by_torch(engine: str, x: Tensor) -> bool:
    """Whether torch must see operations of its own: to transform them, to write TorchScript or ONNX, which know no
    others, or to compile dense layers and join them with what is around."""
    if torch.compiler.is_compiling():
        dense = engine.startswith("dense") or (engine.startswith("auto") and not may_choose(x))
        return dense or torch.onnx.is_in_onnx_export()
    return torch.jit.is_tracing() or transformed()


def run_sequence(x: Tensor, targets: Sequence[Target], engine: str) -> Tensor:
    """The layers one after the other as one operation: [B, C, *size] -> [B, O, *size']."""
    if by_torch(engine, x):
        return reference(x, targets, fourier=split_engine(engine)[1])
    tensors = [t for target in targets for t in target.tensors]
    return torch.ops.tkn.target_sequence(x, tensors, *encode(targets), engine)
