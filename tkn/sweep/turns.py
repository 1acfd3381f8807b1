"""Which run of a folder results/<experiment>/ comes next, and which have to wait for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tkn.app.files import in_use
from tkn.sweep.rows import Row

#: The lock of a run's folder, from when a filler chooses it.
CLAIM = ".tkn-fill"


class _Wait(Enum):
    """For another row's run."""

    FOR_A_ROW = 0


@dataclass(frozen=True)
class Turn:
    """A run to be done; `obstacle`: why it can't be, in one line."""

    row: Row
    number: int
    obstacle: str | None = None


class Turns:
    """The runs of `rows` in the folder `results` in their order, without a last one unless a row ends at `seeds`."""

    def __init__(self, rows: Sequence[Row], results: Path, seeds: int | None = None) -> None:
        self._rows, self._left = {row.experiment: row for row in rows}, list(rows)
        self._results, self._seeds = results, seeds
        self._failed: set[Path] = set()

    def folder(self, turn: Turn) -> Path:
        """Where the run is."""
        return self._folder(turn.row, turn.number)

    def next(self) -> Turn | None:
        """The run that comes next, None if there is none, or none now: `others_run`.

        Unfinished runs first; then the rows with the fewest seeds that are finished or being done; of these the one
        with the least work. A run that needs another row's comes after it.
        """
        turns = [turn for row in self._left if (turn := self._turn(row)) is not None]
        if not turns and not self.others_run():
            turns = [
                Turn(row, number, f"it needs another row's run that does not come: {self._named(row, number)}")
                for row in self._left
                for number in self._open(row)[:1]
            ]
        return min(turns, key=self._rank, default=None)

    def others_run(self) -> bool:
        """Whether a run waits for what other processes may be doing."""
        waits = any(self._open(row) for row in self._left)
        return waits and any(_busy(folder) for row in self._left for folder in self._folders(row))

    def fail(self, turn: Turn, missing: bool = False) -> list[Row]:
        """Count out a run that can't be done, and return the rows that are left with it.

        After two of a row that is the row; `missing`: for want of its data, and then all rows of these.
        """
        self._failed.add(self.folder(turn))
        twice = sum(other.parent == self.folder(turn).parent for other in self._failed) > 1
        data = turn.row.data
        lost = [row for row in self._left if (row is turn.row and twice) or (missing and row.data == data)]
        self._left = [row for row in self._left if row not in lost]
        return lost

    def _turn(self, row: Row) -> Turn | None:
        """The row's run that comes next; None if it has all, or all wait."""
        for number in self._open(row):
            obstacle = self._obstacle(row, number)
            if not isinstance(obstacle, _Wait):
                return Turn(row, number, obstacle)
        return None

    def _open(self, row: Row) -> list[int]:
        """The numbers of runs that are not finished, did not fail and are not being done, unfinished ones first."""
        folders = self._folders(row)
        if self._seeds is not None and self._count(row) >= self._seeds * row.folds:
            return []
        numbers = range(len(folders) + len(self._failed) + 1)
        named = {number: self._folder(row, number) for number in numbers}
        free = [
            number
            for number, folder in named.items()
            if folder not in self._failed and not _finished(folder) and not _busy(folder)
        ]
        return sorted(free, key=lambda number: not _unfinished(named[number]))

    def _obstacle(self, row: Row, number: int) -> str | _Wait | None:
        """Why a run can't be done, or not yet."""
        for key, path in row.files(number, self._results).items():
            run = self._run_of(path)
            if run is None:
                if not path.is_file():
                    return f"{key}={path} is not a file"
                continue
            if _finished(run):
                if not path.is_file():
                    return (
                        f"{key}={path}: that run is finished but left no such file: remove {run} to have it done anew"
                    )
                continue
            other = self._rows.get(run.parent.name)
            if other is None:
                return f"{key}={path}: {run.parent.name} has to come before, and is not among the experiments"
            if run in self._failed or other not in self._left:
                return f"{key}={path}: that run could not be done"
            return _Wait.FOR_A_ROW
        return None

    def _named(self, row: Row, number: int) -> str:
        return ", ".join(f"{key}={path}" for key, path in row.files(number, self._results).items())

    def _run_of(self, path: Path) -> Path | None:
        """The folder of the row's run that the file is in; None of one that lies elsewhere."""
        results = self._results.resolve()
        try:
            experiment, seed, *_ = path.resolve().relative_to(results).parts
        except ValueError:
            return None
        return self._results / experiment / seed

    def _rank(self, turn: Turn) -> tuple[bool, float, float, str]:
        seeds = self._count(turn.row) / turn.row.folds
        return not _unfinished(self.folder(turn)), seeds, turn.row.work, turn.row.experiment

    def _count(self, row: Row) -> int:
        """Its runs that are finished or being done."""
        return sum(_finished(folder) or _busy(folder) for folder in self._folders(row))

    def _folder(self, row: Row, number: int) -> Path:
        return self._results / row.experiment / row.folder(number)

    def _folders(self, row: Row) -> list[Path]:
        return list((self._results / row.experiment).glob(row.folders))


def _finished(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def _unfinished(folder: Path) -> bool:
    return (folder / "last.ckpt").is_file() and not _finished(folder)


def _busy(folder: Path) -> bool:
    """Whether a filler or a run is in it."""
    return in_use(folder, CLAIM) or in_use(folder)
