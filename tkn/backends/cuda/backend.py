"""The GPU's ROI backend as the operators see it: what it can't compute, and its chains of layers."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tkn.app.messages import first_line
from tkn.backends.cuda import costs
from tkn.backends.cuda.device import on
from tkn.kept import Kept
from tkn.moving import NotPrepared, Record, checked_once, record_here
from tkn.spec import Target
from tkn.windows import kept_bounds, learns
from tkn.work import Work

if TYPE_CHECKING:
    from tkn.backends.cuda.chain import Chain
    from tkn.backends.cuda.stage import Stage

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
#: The oldest GPUs whose matrix units know all of these types.
_LEAST_CAPABILITY = (8, 0)
#: Pixels of a pooling's window: each is a piece of the kernels' code, and their numbers are kept as bytes.
_MOST_POOLED = 64
#: Place for moving ROIs: for so many times the rows and lists that there are.
_HEADROOM = 1.25
#: Lists of layers, for the states of their ROIs that came last, bytes on the device.
_stages = Kept(4 * 2**30)


def reason_not(x: Tensor, targets: Sequence[Target], *, autocast: bool) -> str | None:
    """Why the backend can't compute these layers of x, None if it can. Under autocast x may be of another type."""
    if any(target.spec.dims != 2 for target in targets):
        return f"on a GPU the ROI engine works on maps of two dimensions, not {targets[0].spec.dims}"
    if any(target.per_image for target in targets):
        return "the ROI engine knows no ROIs of each image"
    if x.dtype not in _TYPES:
        return f"the ROI engine computes float32, float16 and bfloat16 on a GPU, not {x.dtype}"
    for target in targets:
        if target.spec.pool is not None and prod(target.spec.pool.kernel) > _MOST_POOLED:
            return f"the ROI engine pools at most {_MOST_POOLED} pixels on a GPU, not {target.spec.pool.kernel}"
        for parameter in (target.weight, target.bias):
            if parameter is not None and parameter.dtype != x.dtype and not autocast:
                return f"the ROI engine needs parameters of the input's type, {x.dtype}, not {parameter.dtype}"
            if parameter is not None and parameter.dtype not in _TYPES:
                return f"the ROI engine computes float32, float16 and bfloat16 on a GPU, not {parameter.dtype}"
    return None


def available(device: torch.device, dtype: torch.dtype, *, may_build: bool) -> bool:
    """Whether the kernels run on this GPU and compute numbers of `dtype` as torch does; `may_build`: they may be
    compiled and checked if that was not done yet. A warning says once why not."""
    key = device, dtype
    if key not in _checked and may_build:
        _checked[key] = reason_unavailable(device) or _failed_check(device, dtype)
        if _checked[key] is not None:
            why = f"no ROI engine on the GPU: {_checked[key]}; torch computes densely"
            warnings.warn(why, RuntimeWarning, stacklevel=2)
    return _checked.get(key, "not checked yet") is None


#: By device and type of numbers: why the kernels can't be used there, None if they can.
_checked: dict[tuple[torch.device, torch.dtype], str | None] = {}


def reason_unavailable(device: torch.device) -> str | None:
    """What is missing for the kernels, None if nothing is."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton can't be imported ({error})"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return "its kernels were made for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, below 8.0"
    return None


def _failed_check(device: torch.device, dtype: torch.dtype) -> str | None:
    from tkn.backends.cuda.check import wrong_results

    try:
        # Modes of a user's (inference, autocast, another default device) are not for the check.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            return wrong_results(device, dtype)
    except Exception as error:
        # Triton's errors are of many kinds: of a driver, an assembler or a compiler that it does not know.
        return f"its check failed with {type(error).__name__}: {first_line(error)}"


def live(shape: tuple[int, ...], dtype: torch.dtype, targets: Sequence[Target], result: torch.dtype) -> float:
    """The share of the last layer's outputs, pooled, that have rows; the arguments are those of `chain`."""
    del dtype, result  # lists are the same for all types
    rows = stage(shape, targets).output
    return rows.capacity / (rows.channels * rows.pixels)


def seconds(engine: str, work: Work) -> float:
    """What `engine` is estimated to take."""
    return costs.seconds(engine, work)


def stage(shape: tuple[int, ...], targets: Sequence[Target]) -> Stage:
    """The lists of the last of `targets`, which begin at a batch of `shape` [B, C, H, W]; kept while the ROIs stay in
    their bounds."""
    from tkn.backends.cuda.rows import full_rows
    from tkn.backends.cuda.stage import Stage

    key = _key(shape, targets)
    record = record_here()
    headroom = _HEADROOM if learns(targets[-1]) else 1.0

    def make() -> Stage:
        if record is not None:
            raise NotPrepared
        last, device = targets[-1], targets[-1].weight.device
        first = len(targets) == 1
        source = full_rows(shape[1], (shape[2], shape[3]), device) if first else stage(shape, targets[:-1]).output
        geometry = last.spec.geometry(source.size, last.kernel)
        bounds = kept_bounds(last, geometry.output_size)
        rois = bounds.rois.clone() if bounds is not None else _whole(len(last.weight), geometry.output_size, device)
        made = Stage(source, rois, geometry, last.spec.groups, last.spec.relu, last.spec.pool, headroom)
        made.prepare(gradients=last.weight.requires_grad or learns(last))
        return made

    with _making(targets[0].weight.device):
        made = _stages.get(key, make, Stage.nbytes)
    if record is not None:
        record.lists[key] = Used(shape, tuple(targets), made)
        record.refill = refill
    return made


@dataclass(frozen=True, eq=False)
class Used:
    """Lists that a captured program reads: of the last of `targets`, which begin at a batch of `shape`."""

    shape: tuple[int, ...]
    targets: tuple[Target, ...]
    stage: Stage


def refill(record: Record) -> bool:
    """Make the lists that a captured program reads anew, for the present ROIs, in their tensors; whether they fit. If
    they do not, they are good for nothing more."""
    from tkn.backends.cuda.rows import Outgrown
    from tkn.backends.cuda.stage import Stage

    # Whoever asks for lists of these states gets others.
    for key in record.lists:
        _stages.drop(key)
    used, record.lists = list(record.lists.values()), {}
    try:
        for one in used:
            size = one.stage.geometry.output_size
            bounds = kept_bounds(one.targets[-1], size)
            with _making(one.stage.bounds.device):
                one.stage.refill(one.stage.bounds.clone() if bounds is None else bounds.rois)
    except Outgrown:
        return False
    # Other lists that begin at these are no longer right.
    written = {id(one.stage.output) for one in used}
    for key, stage in _stages.items():
        if isinstance(stage, Stage) and id(stage.source) in written:
            _stages.drop(key)
    for one in used:
        key = _key(one.shape, one.targets)
        record.lists[key] = one
        _stages.put(key, one.stage, one.stage.nbytes())
    return True


@contextmanager
def _making(device: torch.device) -> Iterator[None]:
    """Lists are made on the device, in tensors that may be written again, whatever mode the caller is in."""
    with on(device), torch.inference_mode(False), torch.no_grad():
        yield


def _key(shape: tuple[int, ...], targets: Sequence[Target]) -> Hashable:
    """What lists are kept under: all that they depend on."""
    size, layers = tuple(shape[2:]), []
    for target in targets:
        bounds = kept_bounds(target, target.output_size(size))
        # Lists of ROIs that move are one layer's: they are made anew in the same tensors.
        place = target.loc.data_ptr() if learns(target) else None
        layers.append((target.spec, target.weight.shape, place, None if bounds is None else bounds.key))
        size = target.result_size(size)
    return targets[0].weight.device, shape[1:], tuple(layers)


def forget() -> None:
    """Let go of all lists."""
    _stages.clear()


def _whole(kernels: int, size: tuple[int, ...], device: torch.device) -> Tensor:
    """Bounds of kernels that work in the whole map."""
    rois = torch.zeros(kernels, 2, 2, dtype=torch.int64, device=device)
    rois[:, 0, 1], rois[:, 1, 1] = size
    return rois


def chain(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    targets: Sequence[Target],
    result: torch.dtype,
    lanes: int | None = None,
) -> Chain:
    """`targets` on inputs of `shape` [B, C, H, W], with rows and a result of the type `result`. Rows are
    the same for every `dtype`, and there are no `lanes`."""
    del dtype, lanes
    from tkn.backends.cuda.chain import Chain

    with checked_once():
        stages = tuple(stage(shape, targets[: count + 1]) for count in range(len(targets)))
    return Chain(tuple(targets), stages, shape[0], result, targets[-1].channels_last)
