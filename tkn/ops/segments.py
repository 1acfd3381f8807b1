"""Which layers of a sequence are computed inside their ROIs, and which densely: runs of one kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tkn.ops.choice import is_faster
from tkn.ops.engines import Backend, backend_of, split_engine
from tkn.spec import Target
from tkn.windows import kept_bounds
from tkn.work import Work


@dataclass(frozen=True)
class Segment:
    """Layers in a row that one engine computes: `backend`, or torch, densely, where that is None."""

    targets: tuple[Target, ...]
    backend: Backend | None
    #: why torch computes them
    why: str = ""


@dataclass(frozen=True)
class Call:
    """How the operator is called, as far as a choice depends on it.

    `dtype`: of the result; `autocast`: because of it. `training`: gradients will be asked for, `needs_x`: also the
    input's. `may_build`: kernels may be compiled and checked now.
    """

    dtype: torch.dtype
    autocast: bool
    training: bool
    needs_x: bool
    may_build: bool


def segments(x: Tensor, targets: Sequence[Target], engine: str, call: Call) -> list[Segment]:
    """The layers by what computes them. ValueError if "roi" is asked for and can't compute them."""
    name, fourier = split_engine(engine)
    layers = tuple(targets)
    if name == "dense":
        return [Segment(layers, None, "engine='dense'")]
    if not _is_batch(x, layers):
        return [Segment(layers, None, f"an input of shape {list(x.shape)} is torch's")]
    backend = backend_of(x.device)
    reason = _reason_not(backend, x, layers, call)
    if name == "roi" and reason is not None:
        raise ValueError(f"engine='roi': {reason}; engine='auto' takes torch there")
    if reason is not None or backend is None:
        return [Segment(layers, None, reason or "")]
    if not backend.available(x.dtype, may_build=call.may_build):
        return [Segment(layers, None, "there are no kernels here")]
    return [Segment(layers, backend)] if name == "roi" else _faster(x, layers, backend, fourier, call)


def _is_batch(x: Tensor, targets: Sequence[Target]) -> bool:
    """Whether x is a batch of images for these layers; else torch says what is wrong, or takes it as one image."""
    if x.dim() != targets[0].spec.dims + 2 or 0 in x.shape:
        return False
    channels = [x.shape[1], *(len(target.weight) for target in targets)]
    return all(c == t.weight.shape[1] * t.spec.groups for c, t in zip(channels, targets, strict=False))


def _reason_not(backend: Backend | None, x: Tensor, targets: Sequence[Target], call: Call) -> str | None:
    if backend is None:
        return f"the ROI engine works on the CPU, not on {x.device}"
    reason = backend.reason_not(x, targets, autocast=call.autocast)
    size = tuple(x.shape[2:])
    for target in targets:
        if reason is None and min(target.output_size(size)) < 1:
            reason = f"kernel_size={target.kernel} does not fit into a padded input of {size} pixels"
        if reason is None and target.spec.pool is not None and min(target.result_size(size)) < 1:
            reason = f"a pooling of {target.spec.pool.kernel} pixels is larger than the map, {target.output_size(size)}"
        if reason is not None:
            return reason
        size = target.result_size(size)
    return None


def _faster(x: Tensor, targets: Sequence[Target], backend: Backend, fourier: bool, call: Call) -> list[Segment]:
    made: list[Segment] = []
    shape = start = tuple(x.shape)  # of this layer's input, and of that of the run of ROI layers before it
    for position, target in enumerate(targets):
        before = made[-1].targets if made and made[-1].backend is not None else ()
        if not before:
            start = shape
        live = backend.live(start, x.dtype, before, call.dtype) if before else 1.0
        work = work_of(shape, target, live, call, needs_x=call.needs_x or position > 0, fourier=fourier)
        chosen = backend if target.spec.clip and is_faster(backend, work) else None
        if made and made[-1].backend is chosen:
            made[-1] = Segment((*made[-1].targets, target), chosen, made[-1].why)
        else:
            made.append(Segment((target,), chosen, "" if chosen else "torch is faster by the cost model"))
        shape = (shape[0], len(target.weight), *target.result_size(shape[2:]))
    return made


def work_of(shape: tuple[int, ...], target: Target, live: float, call: Call, *, needs_x: bool, fourier: bool) -> Work:
    """A layer on an input of `shape` [B, C, *size]."""
    spec, weight = target.spec, target.weight
    output = target.output_size(shape[2:])
    bounds = kept_bounds(target, output)
    pixels = torch.Size(output).numel() * len(weight)
    return Work(
        batch=shape[0],
        channels=shape[1],
        outputs=len(weight),
        groups=spec.groups,
        size=shape[2:],
        output=output,
        kernel=target.kernel,
        stride=spec.stride,
        dilation=spec.dilation,
        dtype=call.dtype,
        share=1.0 if bounds is None else bounds.area / pixels,
        live=live,
        relu=spec.relu,
        pool=None if spec.pool is None else spec.pool.kernel,
        training=call.training,
        needs_x=needs_x,
        channels_last=weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        if weight.dim() == 4
        else False,
        fourier=fourier,
        threads=torch.get_num_threads(),
    )
