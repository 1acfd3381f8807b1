"""The milliseconds that benchmarks/pays.py measured, read for the rows that they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tkn.app.messages import message
from tkn.report.pays.rows import where
from tkn.report.runs.groups import Group

BATCHES = (1, 128)
#: What tables call the engines.
_ENGINES = {
    **{"tkn": "this project", "tkn-dense": "this project", "openvino": "OpenVINO"},
    **{"torch": "torch", "torch-channels-last": "torch"},
    **{"torch-masked": "torch", "torch-masked-channels-last": "torch"},
}


@dataclass(frozen=True)
class Timed:
    """Seconds of a batch by the fastest engine: median and quartiles."""

    engine: str
    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class SetTimings:
    """What was timed of a set.

    path: the file; where: machine, threads and versions in words; runs: by arm (experiment/seed, multiply-adds);
    fastest: by arm and batch.
    """

    path: Path
    where: str
    runs: Mapping[str, tuple[str, int]]
    fastest: Mapping[tuple[str, int], Timed]

    def of(self, arm: str, group: Group, batch: int) -> Timed | None:
        """Of a row's arm; None if it was not timed, or another network than one of the row's was."""
        counted = {(where(run), run.result["macs_roi"]) for run in group.runs}
        return self.fastest.get((arm, batch)) if self.runs.get(arm) in counted else None


def timings_path(folder: Path, name: str) -> Path:
    """Of a set's timings."""
    return folder / f"pays_{name}.json"


def read_set_timings(folder: Path, name: str) -> SetTimings | None:
    """The set's timings; None if there are none. ValueError for a damaged file."""
    path = timings_path(folder, name)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        runs = {row["arm"]: (str(row["run"]), int(row["macs"])) for row in content["networks"]}
        fastest: dict[tuple[str, int], Timed] = {}
        for row in content["timings"]:
            if "seconds" not in row:
                continue
            seconds = row["seconds"]
            timed = Timed(_ENGINES[row["engine"]], *(float(seconds[key]) for key in ("median", "q1", "q3")))
            key = row["arm"], int(row["batch"])
            if not 0 < timed.q1 <= timed.median <= timed.q3:
                raise ValueError(f"the quartiles of {key} are {timed.q1}, {timed.median}, {timed.q3}")
            fastest[key] = min(timed, fastest.get(key, timed), key=lambda timed: timed.median)
        return SetTimings(path, _where(content), runs, fastest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of timings: {message(error)}") from error


def _where(content: Mapping[str, Any]) -> str:
    versions = content["versions"]
    others = content["busy_with_others"]
    parts = [content["machine"]["cpu"], f"threads: {content['threads']}"]
    parts += [f"{name} {versions[name]}" for name in ("torch", "openvino") if versions.get(name)]
    parts += [] if others is None else [f"CPUs busy with something else: {others}"]
    return ", ".join(parts)
