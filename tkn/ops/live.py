"""A fully connected layer after target layers: it multiplies only with the inputs that some ROI reaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.geometry import Pool
from tkn.kept import Kept
from tkn.roi import roi_mask
from tkn.spec import Target
from tkn.windows import kept_bounds, readable

#: Above this share of live inputs bringing columns of the weight together does not pay.
_MOST = 0.5
#: Indices of live inputs, bytes.
_made = Kept(16 * 2**20)


def live_inputs(x: Tensor, targets: Sequence[Target]) -> Tensor | None:
    """Of the flattened results [O * H' * W'] of the last of `targets`, which begin at x [B, C, H, W], those that ROIs
    reach: indices, where they are few and nothing records what is computed; else None."""
    last = targets[-1]
    if x.dim() != 4 or last.per_image or not readable(last):
        return None
    size = tuple(x.shape[2:])
    for target in targets[:-1]:
        size = target.result_size(size)
    before, (height, width), pool = last.output_size(size), last.result_size(size), last.spec.pool
    bounds = kept_bounds(last, before)
    if bounds is None:
        return None
    key, rois = (before, None if pool is None else pool.kernel, bounds.key), bounds.rois
    live = _made.get(key, lambda: _indices(before, rois, pool), lambda indices: indices.nbytes)
    return live if 0 < len(live) < _MOST * len(last.weight) * height * width else None


def _indices(size: tuple[int, ...], rois: Tensor, pool: Pool | None) -> Tensor:
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        mask = roi_mask(size, rois)
        if pool is not None:
            mask = F.max_pool2d(mask.float(), pool.kernel) > 0
        return mask.flatten().nonzero().flatten()


def linear_of_live(x: Tensor, live: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x [B, inputs], of which only the columns `live` are not zero, and need gradients."""
    return F.linear(_Columns.apply(x, live), _Columns.apply(weight, live), bias)


class _Columns(torch.autograd.Function):
    """Columns of a matrix. torch's own gradient of such a choice goes through them one by one."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        ctx.shape = matrix.shape
        return matrix.gather(1, columns.expand(len(matrix), -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (columns,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_(1, columns.expand(len(grad), -1), grad), None
