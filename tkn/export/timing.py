"""Milliseconds of the network, of the dense one that it stands for, and of its plans, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from tkn.app.messages import message
from tkn.bench.alone import alone
from tkn.bench.engines import TIMED_ENGINES, prepare_inference
from tkn.bench.measure import Sampling, time_interleaved
from tkn.layers import roi_layers
from tkn.models.dense import densified
from tkn.plan.compare import random_images

_ROUNDS, _REPEATS, _WARMUP = 5, 10, 0.3
#: Dense engines by how the table calls them; the second multiplies in bfloat16 where the CPU can.
_DENSE = {"torch": "torch", "OpenVINO": "openvino"}
_REDUCED = {"OpenVINO, bfloat16": "openvino-reduced"}


def time_all(
    network: nn.Module, plans: Mapping[int, nn.Module], input_size: tuple[int, ...], seconds: float, dtype: torch.dtype
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each network, engine and batch size that a plan is for, and what could not be timed, a line each.

    A row has `network` ("dense", "targeted" or "plan"), `engine`, `batch` and `seconds` of a batch (n, median, q1, q3,
    least). A network without target layers is "dense". `seconds`: how long each is timed at least, after a warm-up.
    """
    targeted = bool(roi_layers(network))
    dense = densified(network) if targeted else network
    engines = _DENSE if dtype == torch.float32 else _DENSE | _REDUCED
    rows, notes = [], []
    for batch, plan in plans.items():
        images = random_images(batch, input_size)
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        for name, engine in engines.items():
            try:
                prepared = prepare_inference(TIMED_ENGINES[engine], dense, images, torch.get_num_threads())
                calls["dense", name] = prepared.call
            except ModuleNotFoundError as error:
                notes.append(f"{name} is not timed: {error.name} is not installed (extra bench)")
            except Exception as error:  # another engine must not stop the export
                notes.append(f"{name} is not timed at batch {batch}: {message(error)[:200]}")
        if targeted:
            calls["targeted", "torch"] = partial(network, images)
        calls["plan", "this engine"] = partial(plan, images)
        sampling = Sampling(_ROUNDS, _REPEATS, seconds, min(_WARMUP, seconds))
        with alone(), torch.inference_mode():
            timings, failures = time_interleaved({", ".join(key): call for key, call in calls.items()}, sampling, 0)
        notes += [f"{name} could not be timed at batch {batch}: {message(e)[:200]}" for name, e in failures.items()]
        rows += [
            {"network": key[0], "engine": key[1], "batch": batch, "seconds": asdict(timings[", ".join(key)])}
            for key in calls
            if ", ".join(key) in timings
        ]
    return rows, list(dict.fromkeys(notes))
