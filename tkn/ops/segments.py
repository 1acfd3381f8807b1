"""Which layers of a sequence are computed inside their ROIs, and which densely: runs of one kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tkn.moving import record_here
from tkn.ops import tuned
from tkn.ops.choice import is_faster
from tkn.ops.engines import Backend, backend_of, may_choose, split_engine
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


#: Told of every call that must choose; for `tkn.tune`.
observer: Callable[[Tensor, Sequence[Target], Backend, bool, Call], None] | None = None


def is_observed() -> bool:
    """Whether every call that must choose is to be seen."""
    return observer is not None


def segments(x: Tensor, targets: Sequence[Target], engine: str, call: Call) -> list[Segment]:
    """The layers by what computes them. ValueError if "roi" is asked for and can't compute them."""
    name, fourier = split_engine(engine)
    layers = tuple(targets)
    if name == "dense":
        return [Segment(layers, None, "engine='dense'")]
    if name == "auto" and not may_choose(x):
        return [Segment(layers, None, f"engine='auto' is torch on {x.device.type}")]
    if not _is_batch(x, layers):
        return [Segment(layers, None, f"an input of shape {list(x.shape)} is torch's")]
    backend = backend_of(x.device)
    reason = _reason_not(backend, x, layers, call)
    if reason is None and _is_captured_unseen(x):
        reason = "no lists are made while a GPU's work is captured"
    if name == "roi" and reason is not None:
        raise ValueError(f"engine='roi': {reason}; engine='auto' takes torch there")
    if reason is not None or backend is None:
        return [Segment(layers, None, reason or "")]
    if not backend.available(x.device, call.dtype, may_build=call.may_build):
        built = "" if call.may_build else " yet, and none may be built in a checkpoint, a backward pass or a capture"
        return [Segment(layers, None, f"there are no kernels here{built}")]
    made = [Segment(layers, backend)] if name == "roi" else _faster(x, layers, backend, fourier, call)
    record = record_here()
    if record is not None:
        standing_for_x = x.detach().new_empty(()).expand(x.shape)
        record.choices.append(Choice(standing_for_x, layers, engine, call, backends_of(made)))
    return made


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen for a captured call, and how it is asked again: `x` has the shape and type of the input."""

    x: Tensor
    targets: tuple[Target, ...]
    engine: str
    call: Call
    backends: list[tuple[int, Backend | None]]

    def stands(self) -> bool:
        """Whether the same would be chosen now."""
        return backends_of(segments(self.x, self.targets, self.engine, self.call)) == self.backends


def backends_of(made: Sequence[Segment]) -> list[tuple[int, Backend | None]]:
    """How many layers each segment has, and what computes them."""
    return [(len(segment.targets), segment.backend) for segment in made]


def _is_captured_unseen(x: Tensor) -> bool:
    """Whether a GPU's work is captured by somebody who will not follow the ROIs."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing() and record_here() is None


def _is_batch(x: Tensor, targets: Sequence[Target]) -> bool:
    """Whether x is a batch of images for these layers; else torch says what is wrong, or takes it as one image."""
    if x.dim() != targets[0].spec.dims + 2 or 0 in x.shape:
        return False
    channels = [x.shape[1], *(len(target.weight) for target in targets)]
    return all(c == t.weight.shape[1] * t.spec.groups for c, t in zip(channels, targets, strict=False))


def _reason_not(backend: Backend | None, x: Tensor, targets: Sequence[Target], call: Call) -> str | None:
    if backend is None:
        return f"there is no ROI engine for {x.device}"
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
    if observer is not None:
        observer(x, targets, backend, fourier, call)
    works = works_of(tuple(x.shape), targets, call, fourier)
    known = tuned.found(works)
    if known is not None and len(known) == len(targets):
        return joined(targets, known, backend, "torch was faster when tkn.tune measured it")
    inside: list[bool] = []
    start = 0  # of the run of layers inside their ROIs before this one
    for position, (target, work) in enumerate(zip(targets, works, strict=True)):
        if start < position and inside[-1]:
            shape = (work.batch, works[start].channels, *works[start].size)
            live = backend.live(shape, x.dtype, targets[start:position], call.dtype)
        else:
            start, live = position, 1.0
        inside.append(target.spec.clip and is_faster(backend, replace(work, live=live)))
    return joined(targets, inside, backend, "torch is estimated to be faster")


def joined(targets: Sequence[Target], inside: Sequence[bool], backend: Backend, why: str) -> list[Segment]:
    """Segments of layers in a row that are computed alike: `inside` their ROIs by `backend`, or by torch, `why`."""
    made: list[Segment] = []
    for target, chosen in zip(targets, inside, strict=True):
        if made and (made[-1].backend is not None) == chosen:
            made[-1] = replace(made[-1], targets=(*made[-1].targets, target))
        else:
            made.append(Segment((target,), backend if chosen else None, "" if chosen else why))
    return made


def works_of(shape: tuple[int, ...], targets: Sequence[Target], call: Call, fourier: bool) -> list[Work]:
    """Each layer on what the ones before give it, which may be anything where it is not yet known to be zero."""
    works = []
    for position, target in enumerate(targets):
        works.append(work_of(shape, target, 1.0, call, needs_x=call.needs_x or position > 0, fourier=fourier))
        shape = (shape[0], len(target.weight), *target.result_size(shape[2:]))
    return works


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
        channels_last=target.channels_last,
        fourier=fourier,
        threads=torch.get_num_threads(),
        device=_device_name(weight.device),
    )
