"""Rows of a benchmark: engines prepared one after the other, then timed in turns; one that fails says so in its row."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from tkn.app.messages import message
from tkn.bench.engines import Prepared
from tkn.bench.measure import Sampling, host_seconds, time_interleaved
from tkn.bench.on_gpu import gpu_seconds, graphed
from tkn.load import OtherLoad

_log = logging.getLogger(__name__)

#: What the extra "bench" installs.
PEERS = ("onnxruntime", "openvino", "onnx", "onnxscript")


def time_rows(
    rows: Mapping[str, dict[str, Any]],
    preparations: Mapping[str, Callable[[], Prepared]],
    sampling: Sampling,
    seed: int,
    others: OtherLoad,
    *,
    inference: bool,
    on_gpu: bool = False,
) -> None:
    """Fill the rows of the same names: of a call precision, difference, notes and seconds, or the failure.

    `others` watches the machine while calls are timed. inference: within torch's mode of that name.
    """
    context: Callable[[], AbstractContextManager[Any]] = torch.inference_mode if inference else nullcontext
    calls: dict[str, Callable[[], object]] = {}
    for name, prepare in preparations.items():
        _log.info("preparing %s", name)
        start = time.perf_counter()
        try:
            prepared = prepare()
            with context():
                call = graphed(prepared.call) if on_gpu else prepared.call
        except Exception as error:  # a failing engine must not stop the others
            _log.debug("%s failed", name, exc_info=True)
            rows[name]["failure"] = reason(error)
            continue
        rows[name] |= _prepared_row(prepared, time.perf_counter() - start)
        calls[name] = call
    _log.info("timing %s candidates", len(calls))
    with context(), others:
        timings, failures = time_interleaved(calls, sampling, seed, gpu_seconds if on_gpu else host_seconds)
    for name, timing in timings.items():
        rows[name]["seconds"] = {key: significant(value) for key, value in asdict(timing).items()}
    for name, failure in failures.items():
        rows[name]["failure"] = reason(failure)
    calls.clear()
    gc.collect()


def _prepared_row(prepared: Prepared, seconds: float) -> dict[str, Any]:
    return {
        "precision": prepared.precision,
        "difference": significant(prepared.difference),
        "notes": list(prepared.notes),
        "prepare_seconds": round(seconds, 3),
    }


def reason(error: Exception) -> str:
    """Why an engine failed, in a line or few."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in PEERS:
        return f"{error.name} is not installed: pip install .[bench]"
    text = message(error)[:300]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def significant(value: float) -> float:
    """Five digits of a time say more than any clock."""
    return value if isinstance(value, int) else float(f"{value:.5g}")
