"""How fast the runs' networks infer on this machine, next to the dense ones: timings.json in the report's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tkn.app.files import write_whole
from tkn.app.messages import message
from tkn.backends.cpu.build import available
from tkn.bench.machine import describe_machine
from tkn.bench.measure import Sampling, time_interleaved
from tkn.load import OtherLoad
from tkn.models import BASE
from tkn.models.dense import densified
from tkn.plan.plan import accelerate
from tkn.report.runs.groups import Group
from tkn.report.runs.roi_states import trained_model
from tkn.report.runs.run import Run

NAME = "timings.json"
_SAMPLING = Sampling(rounds=5, repeats=10, seconds=1.0, warmup=0.2)
_KEYS = ("machine", "other_load", "threads", "batch_size", "torch", "kernels", "rows")


def measure_timings(runs: Iterable[Run], batch_size: int, folder: Path) -> list[str]:
    """Time each counted targeted run that has a checkpoint, and its dense network, in turns; write timings.json.

    The file holds `machine`, `other_load` (CPUs that other processes kept busy; null if unknown), `threads`,
    `batch_size`, `torch`, `kernels` (whether the engine's kernels could be compiled; if not, torch computes) and
    `rows`: `key` (networks of one key compare), `model`, `folder` (relative to the report's; null of a dense network),
    `macs` and `seconds` (n, median, q1, q3, least). Returns what could not be timed, a line each.
    """
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {}
    notes = []
    for run in runs:
        if run.state != "finished" or not run.result.get("attention"):
            continue
        try:
            model, identity = trained_model(run)
            input_size, outputs = tuple(identity["input_size"]), identity["num_outputs"]
            batch = torch.rand((batch_size, *input_size), generator=torch.Generator().manual_seed(0))
            call = _call(model, batch)
            base = str(run.result.get("base_model") or BASE.get(run.result["model"], run.result["model"]))
            key = f"{base} {'x'.join(map(str, input_size))} {outputs}"
            dense = calls.get(key) or _call(densified(model), batch)
        except (ValueError, KeyError, RuntimeError) as error:
            notes.append(f"{run.name} is not timed: {message(error)}")
            continue
        if key not in calls:
            calls[key] = dense
            rows.append({"key": key, "model": base, "folder": None, "macs": run.result["macs_dense"]})
        where = _relative(run, folder)
        calls[where] = call
        rows.append({"key": key, "model": run.result["model"], "folder": where, "macs": run.result["macs_roi"]})
    if not rows:
        return [*notes, "no counted run has target layers and a checkpoint: nothing is timed"]
    load = OtherLoad()
    with load:
        timings, failures = time_interleaved(calls, _SAMPLING, seed=0)
    notes += [f"{name} could not be timed: {message(error)}" for name, error in failures.items()]
    names = [row["folder"] or row["key"] for row in rows]
    content = {
        "machine": describe_machine(),
        "other_load": load.mean(),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "torch": torch.__version__,
        "kernels": available(torch.float32),
        "rows": [
            {**row, "seconds": asdict(timings[name])} for row, name in zip(rows, names, strict=True) if name in timings
        ],
    }
    write_whole(folder / NAME, json.dumps(content, indent=2) + "\n")
    return notes


def _call(model: nn.Module, batch: torch.Tensor) -> Callable[[], object]:
    plan = accelerate(model, batch_size=len(batch), input_size=tuple(batch.shape[1:]))
    return lambda: plan(batch)


def _relative(run: Run, folder: Path) -> str:
    return Path(os.path.relpath(run.folder.resolve(), folder.resolve())).as_posix()


def read_timings(folder: Path) -> dict[str, Any] | None:
    """The content of the folder's timings.json; None if there is none. ValueError if it is damaged."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        dense = {row["key"] for row in content["rows"] if row["folder"] is None}
        complete = all(key in content for key in _KEYS) and all(
            row["seconds"]["median"] > 0 and row["seconds"]["q3"] >= row["seconds"]["q1"] and row["macs"] > 0
            for row in content["rows"]
        )
        # A targeted network whose dense one failed compares with nothing.
        content["rows"] = [row for row in content["rows"] if row["key"] in dense]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {message(error)}") from error
    if not complete:
        raise ValueError(f"{path} is not a file of timings")
    return content


def time_gain(timings: Mapping[str, Any], folder: Path) -> Callable[[Group], list[float]]:
    """For a row, how many times faster than the dense network each of its timed runs is; 1 for dense networks' rows.

    A run whose multiply-adds are no longer those that were timed counts as not timed.
    """
    dense = {row["key"]: row["seconds"]["median"] for row in timings["rows"] if row["folder"] is None}
    timed = {(row["folder"], row["macs"]): row for row in timings["rows"]}

    def gain(group: Group) -> list[float]:
        if not group.targeted:
            return [1.0]
        rows = [timed.get((_relative(run, folder), run.result["macs_roi"])) for run in group.runs]
        return [dense[row["key"]] / row["seconds"]["median"] for row in rows if row is not None]

    return gain
