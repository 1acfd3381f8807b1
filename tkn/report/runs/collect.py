"""Finding runs below folders; of runs that repeat each other only one is counted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tkn.report.runs.run import Run, read_run


def collect(paths: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """Every run at and below the paths, in the order of their names, and the paths that hold none.

    FileNotFoundError or NotADirectoryError for a path that is no folder.
    """
    runs: dict[Path, Run] = {}
    empty = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if not path.is_dir():
            raise NotADirectoryError(f"{path} is not a folder")
        found = [run for folder in _folders(path) if (run := read_run(folder)) is not None]
        if not found:
            empty.append(path)
        for run in found:
            runs.setdefault(run.folder.resolve(), run)
    ordered = sorted(runs.values(), key=lambda run: natural(run.folder.resolve().as_posix()))
    return _mark_duplicates(ordered), empty


def _folders(path: Path) -> Iterator[Path]:
    """The path and all folders below it but hidden ones, such as Hydra's."""
    for folder, below, _files in os.walk(path):
        below[:] = sorted((name for name in below if not name.startswith(".")), key=natural)
        yield Path(folder)


def _mark_duplicates(runs: Sequence[Run]) -> list[Run]:
    """The runs, of which only the earliest to finish stays counted of each configuration and seed."""
    first: dict[str, Run] = {}
    finished = [run for run in runs if run.state == "finished"]
    for run in sorted(finished, key=lambda run: (run.folder / "summary.json").stat().st_mtime_ns):
        first.setdefault(_key(run), run)
    marked = []
    for run in runs:
        twin = first[_key(run)] if run.state == "finished" else run
        reason = f"the same configuration and seed as {twin.name}"
        marked.append(run if twin is run else replace(run, state="duplicate", reason=reason))
    return marked


def _key(run: Run) -> str:
    return f"{run.settings()} {run.result['seed']}"


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts 10 after 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
