"""A finished run's network, as the run tested it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tkn.app.messages import message
from tkn.macs import MacsReport, count_macs
from tkn.report.runs.roi_states import checkpoint_path
from tkn.report.runs.run import Run, read_run
from tkn.training.records.checkpoint import checkpoint_network

#: A checkpoint whose multiply-adds differ from the summary's by more than this part is another one: on another device
#: an edge of a ROI may round to the next pixel.
_SAME_MACS = 0.01

#: Whether the functions of these names, code that a run's folder does not hold, may be imported and run.
Trust = Callable[[str], bool]


@dataclass(frozen=True)
class Finished:
    """A run, the network of the checkpoint that its summary is of, clipped to its ROIs, and what that costs."""

    run: Run
    checkpoint: Path
    network: nn.Module
    identity: Mapping[str, Any]
    macs: MacsReport

    @property
    def input_size(self) -> tuple[int, ...]:
        return tuple(self.identity["input_size"])


def read_finished(folder: Path, trust: Trust) -> Finished:
    """The run in `folder`; `trust` is asked before any code that it names is run.

    FileNotFoundError, NotADirectoryError; ValueError for a folder without a finished run, for a run without a
    checkpoint, for a checkpoint of another run, and for code that is not trusted.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a run's folder")
    run = read_run(folder)
    if run is None:
        raise ValueError(f"{folder} holds no run of tkn-run")
    if run.state == "tested":
        raise ValueError(f"{folder} only tests a checkpoint: export the run that trained it")
    if run.state not in ("finished", "pruned"):
        raise ValueError(f"{folder} holds a run that is {run.state}: {run.reason}")
    checkpoint = checkpoint_path(run)
    if not checkpoint.is_file():
        raise ValueError(f"{folder} has no {checkpoint.name}: there is no network to export")
    factory = _factory(run, trust)
    try:
        network, identity = checkpoint_network(checkpoint, factory=factory)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} is damaged: {message(error)}") from error
    macs = count_macs(network, tuple(identity["input_size"]))
    recorded = run.result["macs_roi"]
    if abs(macs.total_roi - recorded) > _SAME_MACS * recorded:
        raise ValueError(
            f"{checkpoint} is of another run: macs_roi is {macs.total_roi:,}, in summary.json {recorded:,}"
        )
    return Finished(run, checkpoint, network, identity, macs)


def _factory(run: Run, trust: Trust) -> str | None:
    """The name of the function that makes the run's network, if it is the user's own and `trust` allows it."""
    config = run.config or {}
    if config.get("model.name") != "python":
        return None
    name = str(config.get("model.factory"))
    require_trust(run.folder, name, trust)
    return name


def require_trust(folder: Path, name: str, trust: Trust) -> None:
    """ValueError if the function `name` of the run in `folder` may not be run."""
    if not re.fullmatch(r"[\w.]+:\w+", name):  # a received run's must not write over the question
        raise ValueError(f"{folder} needs code named {name!r}, which is no package.module:function")
    if not trust(name):
        raise ValueError(f"{folder} needs {name}, code that would be imported and run: read it, then give --trust")
