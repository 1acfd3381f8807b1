"""Timing on a GPU: a call's kernels as one CUDA graph, by the GPU's own clock."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tkn.ops.following import Following

#: Libraries choose their kernels in the first calls.
_FIRST_CALLS = 3
#: So many between two events: the host starts the next one while the GPU computes.
_CALLS = 10


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The kernels that `call` starts as one CUDA graph, which the result replays.

    RuntimeError where they can't be captured, or where the ROIs have left what was captured.
    """
    for _ in range(_FIRST_CALLS):
        call()
    torch.cuda.synchronize()
    graph, following = torch.cuda.CUDAGraph(), Following()
    with following.recording(), torch.cuda.graph(graph):
        result = call()
    following.check()
    if following.left():
        raise RuntimeError("the ROIs left their bounds while the call was captured")

    def replay() -> object:
        graph.replay()
        return result

    # The graph reads what was recorded.
    replay.following = following  # type: ignore[attr-defined]
    return replay


def gpu_seconds(call: Callable[[], object]) -> float:
    """The mean of some calls in a row, by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / _CALLS
