"""All that the page shows, read from results and timings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tkn.report.pays.design import ARMS, OURS, SETS, PaysSet
from tkn.report.pays.rows import Row, read_row, whole_macs
from tkn.report.pays.timings import SetTimings, read_set_timings
from tkn.report.pays.verdicts import Primary, corrected, primary
from tkn.report.runs.groups import Group


@dataclass(frozen=True)
class SetResults:
    """A set's rows by arm, the variants of the targeted one that were tried, by name, and its timings."""

    data: PaysSet
    rows: Mapping[str, Row]
    tried: Mapping[str, Row]
    timings: SetTimings | None

    @property
    def groups(self) -> dict[str, Group]:
        """The arms that were run."""
        return {arm: row.group for arm, row in self.rows.items() if row.group is not None}

    @property
    def whole(self) -> int | None:
        """The dense network's multiply-adds, None where nothing was run."""
        return whole_macs([*self.groups.values(), *(row.group for row in self.tried.values() if row.group is not None)])


@dataclass(frozen=True)
class Study:
    """The sets, by name, and their primary comparisons, corrected for all of them."""

    sets: Mapping[str, SetResults]
    verdicts: tuple[Primary, ...]


def read_study(results: Path, timings: Path) -> Study:
    """The rows below `results` and the files in the folder `timings`.

    FileNotFoundError without the folder `results`, ValueError for runs and timings that can't be read.
    """
    if not results.is_dir():
        raise FileNotFoundError(f"{results} is not a folder")
    sets = {name: _read_set(data, results, timings) for name, data in SETS.items()}
    return Study(sets, tuple(corrected([primary(one.data, one.rows) for one in sets.values()])))


def _read_set(data: PaysSet, results: Path, timings: Path) -> SetResults:
    rows = {arm: read_row(results, data.experiment(arm)) for arm in ARMS}
    begin = f"{data.experiment(OURS)}_"
    tried = sorted(path.name for path in results.glob(f"{begin}*") if path.is_dir())
    return SetResults(
        data,
        rows,
        {name.removeprefix(begin): read_row(results, name) for name in tried},
        read_set_timings(timings, data.name),
    )
