"""Target layers where torch watches: every result of a shape and layout known beforehand, gradients in formulas.

What the backward pass needs again goes into one tensor, the room, of a size that any state of the ROIs fits; what is
not used of it is never touched. It begins with the images of a tile, and with a flag for each layer: whether it was
computed inside its ROIs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor

from tkn.backends.torch.masked import Masked
from tkn.ops.eager import given, gradients_of_reference, how_called, needs_by_layer
from tkn.ops.engines import Runner, backend_of, split_engine
from tkn.ops.segments import segments
from tkn.spec import Target, decode, encode
from tkn.tracing import autocast_dtype

#: More images than a batch may be filled up with, whatever the tiles.
_FILL = 64


def run(x: Tensor, targets: Sequence[Target], engine: str) -> Tensor:
    """The layers as one opaque operation, or with gradients as a pair of them."""
    x, targets = _cast(x, targets)
    tensors = [t for target in targets for t in target.tensors]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)):
        return _Watched.apply(x, encode(targets), engine, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        if len(targets) == 1 and not targets[0].spec.joins:
            one = targets[0]
            tensors_of_one = (one.weight, one.bias, one.loc, one.scale)
            return torch.ops.tkn.target_conv(x, *tensors_of_one, *one.spec.arguments(), engine)
        return torch.ops.tkn.target_sequence(x, tensors, *encode(targets), engine)


def _cast(x: Tensor, targets: Sequence[Target]) -> tuple[Tensor, Sequence[Target]]:
    """As torch's convolutions under autocast: x, weight and bias in its type; loc and scale stay what they are."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, targets
    cast = [
        Target(t.spec, t.weight.to(dtype), None if t.bias is None else t.bias.to(dtype), t.loc, t.scale)
        for t in targets
    ]
    return x.to(dtype), cast


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[str, list[float]], engine: str, *tensors: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, room = torch.ops.tkn.target_forward(x, list(tensors), *layers, engine)
        ctx.save_for_backward(x, room, *tensors)
        ctx.layers, ctx.engine = layers, engine
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, room, *tensors = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        if torch.is_grad_enabled():
            grads = gradients_of_reference(grad, x, decode(tensors, *ctx.layers), needs)
        else:
            found = iter(torch.ops.tkn.target_backward(grad, x, tensors, room, *ctx.layers, ctx.engine, needs))
            grads = [next(found) if needed else None for needed in needs]
        return grads[0], None, None, *grads[1:]


def empty_result(x: Tensor, targets: Sequence[Target]) -> Tensor:
    """An uninitialised result of the layers, as they give it: contiguous, or in channels-last memory format."""
    batch, size = x.shape[: x.dim() - 1 - targets[0].spec.dims], tuple(x.shape[x.dim() - targets[0].spec.dims :])
    for target in targets:
        size = target.result_size(size)
    shape = (*batch, targets[-1].weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x, targets))


def _format(x: Tensor, targets: Sequence[Target]) -> torch.memory_format:
    weight = targets[-1].weight
    if x.dim() == 4 and weight.dim() == 4 and not weight.is_contiguous():
        return (
            torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
    return torch.contiguous_format


def in_layout(y: Tensor, x: Tensor, targets: Sequence[Target]) -> Tensor:
    """The result in the layout of `empty_result`, and no other tensor's memory."""
    return y.contiguous(memory_format=_format(x, targets))


def empty_room(x: Tensor, targets: Sequence[Target]) -> Tensor:
    """The room: enough for what any choice of engines saves."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dims = targets[0].spec.dims
    channels, size = x.shape[x.dim() - 1 - dims], tuple(x.shape[x.dim() - dims :])
    images = (x.shape[0] if x.dim() == dims + 2 else 1) + _FILL
    numbers = 1 + len(targets)  # the choice
    for target in targets:
        output, result, outputs = target.output_size(size), target.result_size(size), target.weight.shape[0]
        # An unused row a pixel may keep pixels apart, and a tile be filled up with unused rows.
        inputs, convolved, given_on = (
            (c + 1) * prod(of) + _FILL for c, of in ((channels, size), (outputs, output), (outputs, result))
        )
        # What was given on counts twice: also which number of a pooling's window it was.
        numbers = numbers + images * (inputs + convolved + 2 * given_on) + outputs * prod(output)
        channels, size = outputs, result
    return torch.empty(numbers, dtype=dtype, device=x.device)


class _Carver:
    """Hands out consecutive parts of the room, after its head of so many numbers."""

    def __init__(self, room: Tensor, head: int) -> None:
        self.room, self.used = room, head

    def take(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        parts = []
        for shape in shapes:
            parts.append(self.room[self.used : self.used + prod(shape)].view(shape))
            self.used += prod(shape)
        return parts


def _runs(targets: Sequence[Target], inside: Sequence[bool]) -> Iterator[tuple[bool, tuple[Target, ...]]]:
    """The layers that are computed inside their ROIs, together where they follow each other; the others one by one."""
    for chosen, run in groupby(zip(inside, targets, strict=True), key=lambda pair: pair[0]):
        layers = tuple(target for _, target in run)
        yield from ([(True, layers)] if chosen else [(False, (target,)) for target in layers])


def _runner(
    inside: bool, shape: tuple[int, ...], x: Tensor, run: tuple[Target, ...], engine: str, lanes: int | None
) -> Runner:
    if not inside:
        return Masked(run[0], shape, split_engine(engine)[1])
    backend = backend_of(x.device)
    assert backend is not None
    return backend.chain(shape, x.dtype, run, x.dtype, lanes)


def forward(x: Tensor, targets: tuple[Target, ...], engine: str) -> tuple[Tensor, Tensor]:
    """The result, and the room."""
    with torch.no_grad():
        single = x.dim() == targets[0].spec.dims + 1
        y = x[None] if single else x
        call = replace(how_called(y, targets), training=True, needs_x=True)
        made = segments(y, targets, engine, call)
        inside = [segment.backend is not None for segment in made for _ in segment.targets]
        room, lanes = empty_room(x, targets), 0
        carver = _Carver(room, 1 + len(targets))
        for position, (chosen, run) in enumerate(_runs(targets, inside)):
            if position > 0:  # the first one's input is there when it is needed again
                carver.take(tuple(y.shape))[0].copy_(y)
            runner = _runner(chosen, tuple(y.shape), y, run, engine, None)
            lanes = runner.lanes if chosen else lanes  # type: ignore[attr-defined]
            y, _ = runner.forward(y, carver.take(*runner.room_shapes()))
        head = [float(lanes), *map(float, inside)]
        room[: len(head)] = torch.tensor(head, dtype=room.dtype, device=room.device)
        return in_layout(y[0] if single else y, x, targets), room


def backward(
    grad: Tensor,
    x: Tensor,
    room: Tensor,
    targets: tuple[Target, ...],
    engine: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of x and of the targets' tensors that are needed, each laid out as what it is the gradient of."""
    with torch.no_grad():
        tensors = [t for target in targets for t in target.tensors]
        single = x.dim() == targets[0].spec.dims + 1
        batch, grad = (x[None], grad[None]) if single else (x, grad)
        wanted = [needs[0], *needs_by_layer(targets, needs[1:])]
        grads = given(targets, _gradients(grad, batch, targets, room, engine, wanted))
        if single and grads[0] is not None:
            grads[0] = grads[0][0]
        # A copy, for an operator may return neither its arguments nor one tensor twice.
        return [
            torch.empty_like(t).copy_(found) for t, found in zip((x, *tensors), grads, strict=True) if found is not None
        ]


def _gradients(
    grad: Tensor, x: Tensor, targets: tuple[Target, ...], room: Tensor, engine: str, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Of x and of each layer's weight, bias, loc and scale."""
    lanes, *inside = room[: 1 + len(targets)].tolist()
    carver = _Carver(room, 1 + len(targets))
    steps: list[tuple[Runner, Tensor, list[Tensor]]] = []
    before, shape = x, tuple(x.shape)
    for position, (chosen, run) in enumerate(_runs(targets, [bool(flag) for flag in inside])):
        if position > 0:
            before = carver.take(shape)[0].to(x.dtype)
        runner = _runner(chosen, shape, x, run, engine, int(lanes))
        steps.append((runner, before, carver.take(*runner.room_shapes())))
        for target in run:
            shape = (shape[0], len(target.weight), *target.result_size(shape[2:]))
    results: list[Tensor | None] = [None] * len(needs)
    end = len(needs)
    for runner, before, saved in reversed(steps):
        begin = end - 4 * len(runner.targets)
        grad_x, *own = runner.backward(grad, before, saved, [any(needs[:begin]), *needs[begin:end]])
        results[begin:end] = own
        if grad_x is None:
            break
        grad, end = grad_x, begin
    else:
        results[0] = grad
    return results
