"""What a target layer is estimated to take on a GPU: arithmetic and memory traffic at rates that large GPUs reach.

The rates are those of layers of TKN6 and CNN6 on an H200. They are not fitted to anything else: `tkn.tune` measures.
"""

from __future__ import annotations

from math import ceil, prod, sqrt

import torch

from tkn.backends.cuda.device import tf32_allowed
from tkn.work import Work

#: Multiply-adds a second of a dense convolution and of the gathered product, in half precision, TF32 and float32.
_DENSE = {"half": 130e12, "tf32": 60e12, "single": 20e12}
_GATHERED = {"half": 350e12, "tf32": 120e12, "single": 12e12}
#: Bytes a second that kernels move.
_MOVED = 3e12
#: Seconds from one kernel's end to the next one's, in a graph of kernels or where the GPU has enough to do.
_KERNEL = 4e-6
#: Kernels of a layer in a forward and in a backward pass.
_KERNELS = {"dense": (4, 8), "roi": (6, 12)}
_TILE = 64


def seconds(engine: str, work: Work) -> float:
    """What `engine`, "dense" or "roi", is estimated to take."""
    return _roi(work) if engine == "roi" else _dense(work)


def _precision(work: Work, *, tf32: bool) -> str:
    if work.dtype != torch.float32:
        return "half"
    return "tf32" if tf32 else "single"


def _kernels(engine: str, work: Work) -> float:
    forward, backward = _KERNELS[engine]
    return _KERNEL * (forward + work.training * backward)


def _dense(work: Work) -> float:
    """The convolution, and passes over its result for window, ReLU and pooling; twice as much for each gradient."""
    rate = _DENSE[_precision(work, tf32=torch.backends.cudnn.conv.fp32_precision == "tf32")]  # type: ignore[attr-defined]
    # Fewer channels than the matrix units' sides leave these empty.
    filled = min(1.0, work.channels / work.groups / 16) * min(1.0, work.outputs / work.groups / 64)
    products = 1 + work.training + (work.training and work.needs_x)
    written = work.batch * work.outputs * prod(work.output) * work.dtype.itemsize
    passes = 3 + 5 * work.training
    return _kernels("dense", work) + products * work.macs / (rate * filled) + passes * written / _MOVED


def _roi(work: Work) -> float:
    """The products of every tile's outputs with the inputs that any of them reaches; packing; passes over rows."""
    inside = work.outputs * prod(work.output) * work.share
    tiles = ceil(inside / _TILE)
    # A tile's pixels are a square, as large as the live outputs at a pixel leave.
    side = sqrt(max(1.0, _TILE / max(1.0, work.outputs * work.share)))
    around = prod(min(side * s + d * (k - 1), n) for s, d, k, n in _axes(work))
    entries = tiles * _TILE * around * work.channels * work.live
    rate = _GATHERED[_precision(work, tf32=tf32_allowed())]
    images = ceil(work.batch / 16) * 16
    products = 1 + work.training + (work.training and work.needs_x)
    size = work.dtype.itemsize
    packed = entries * (1 + (work.training and work.needs_x)) * (2 * size + 2) + work.training * entries * 8
    numbers = images * size * (2 * inside + work.channels * prod(work.size))
    passes = 2 + 3 * work.training
    return _kernels("roi", work) + products * entries * images / rate + (packed + passes * numbers) / _MOVED


def _axes(work: Work) -> zip[tuple[int, int, int, int]]:
    return zip(work.stride, work.dilation, work.kernel, work.size, strict=True)
