"""Target layers where nothing but autograd watches: each by its engine, with gradients of any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tkn.ops.engines import Runner, may_choose, split_engine
from tkn.ops.reference import reference
from tkn.ops.segments import Call, Segment, segments
from tkn.ops.sticky import sticky
from tkn.spec import Target, decode, encode
from tkn.tracing import autocast_dtype


def run(x: Tensor, targets: Sequence[Target], engine: str) -> Tensor:
    """The layers on x [B, C, *size] or [C, *size]. ValueError if engine "roi" can't compute them."""
    name, fourier = split_engine(engine)
    if name == "dense" or (name == "auto" and not may_choose(x)):
        return reference(x, targets, fourier=fourier)
    call = how_called(x, targets)
    return compute(x, sticky(x, targets, engine, call, segments), call, fourier)


def compute(x: Tensor, made: Sequence[Segment], call: Call, fourier: bool) -> Tensor:
    """The segments one after the other."""
    for segment in made:
        x = _compute(x, segment, call, fourier)
    return x


def explain(x: Tensor, target: Target, engine: str) -> str:
    """Which engine would compute the layer on x now, and why."""
    (segment,) = segments(x, (target,), engine, how_called(x, (target,)))
    return "roi" if segment.backend is not None else f"dense: {segment.why}"


def how_called(x: Tensor, targets: Sequence[Target]) -> Call:
    """As it is now: under autocast or not, with gradients or without, where kernels may be built or not."""
    autocast = autocast_dtype(x)
    wanted = any(t.requires_grad for target in targets for t in target.tensors)
    return Call(
        dtype=autocast or x.dtype,
        autocast=autocast is not None,
        training=torch.is_grad_enabled() and (x.requires_grad or wanted),
        needs_x=torch.is_grad_enabled() and x.requires_grad,
        may_build=may_build(),
    )


def may_build() -> bool:
    """Whether kernels may be compiled and checked now: not within a backward pass, nor where what autograd saves is
    handed on (a checkpointed region), nor while a GPU's work is captured."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return torch._C._current_graph_task_id() == -1 and hooks is None and not capturing


def _compute(x: Tensor, segment: Segment, call: Call, fourier: bool) -> Tensor:
    if segment.backend is None:
        return reference(x, segment.targets, fourier=fourier)
    chain = segment.backend.chain(tuple(x.shape), x.dtype, segment.targets, call.dtype)
    tensors = [t for target in segment.targets for t in target.tensors]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)):
        return _InRois.apply(x, chain, encode(segment.targets), *tensors)
    return chain.infer(x)


class _InRois(torch.autograd.Function):
    """Layers inside their ROIs; gradients of gradients by the reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Runner, layers: tuple[str, list[float]], *tensors: Tensor) -> Tensor:
        y, saved = chain.forward(x)
        ctx.save_for_backward(x, *tensors, *saved)
        ctx.chain, ctx.layers, ctx.count = chain, layers, len(tensors)
        kind = x.device.type
        ctx.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        tensors, saved = others[: ctx.count], others[ctx.count :]
        targets = decode(tensors, *ctx.layers)
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        if torch.is_grad_enabled():  # gradients of these gradients are asked for
            enabled, dtype = ctx.autocast
            with torch.autocast(x.device.type, dtype, enabled=enabled):
                grads = gradients_of_reference(grad, x, targets, needs)
        else:
            per_layer = [needs[0], *needs_by_layer(targets, needs[1:])]
            grads = given(targets, ctx.chain.backward(grad, x, saved, per_layer))
        return grads[0], None, None, *grads[1:]


def gradients_of_reference(
    grad: Tensor, x: Tensor, targets: Sequence[Target], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Of x and the targets' tensors, as far as `needs` says, themselves with gradients: by torch, dense."""
    tensors = [t for target in targets for t in target.tensors]
    wanted = [t for t, needed in zip((x, *tensors), needs, strict=True) if needed]
    with torch.enable_grad():
        y = reference(x, targets)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in needs]


def needs_by_layer(targets: Sequence[Target], needs: Sequence[bool]) -> list[bool]:
    """Whether weight, bias, loc and scale of each layer need gradients, from that of the tensors that there are."""
    left = iter(needs)
    return [
        False if tensor is None else next(left)
        for target in targets
        for tensor in (target.weight, target.bias, target.loc, target.scale)
    ]


def given(targets: Sequence[Target], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of x and of the tensors that there are, from those of x and four tensors a layer."""
    there = [
        tensor is not None for target in targets for tensor in (target.weight, target.bias, target.loc, target.scale)
    ]
    return [grads[0], *(grad for grad, is_there in zip(grads[1:], there, strict=True) if is_there)]
