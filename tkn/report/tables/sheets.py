"""The report's tables as headings and texts, before any format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tkn.report.runs.groups import Group, Section, plus_minus
from tkn.report.runs.run import Run

_NAMES = {"error": "error", "mse": "MSE", "mae": "MAE"}
#: What a heading calls an error.
ERROR_TITLES = {**_NAMES, "error": "error (%)"}


@dataclass(frozen=True)
class Column:
    """right: of numbers; brief: also where there is little room, as in a terminal."""

    heading: str
    right: bool = True
    brief: bool = True


@dataclass(frozen=True)
class Sheet:
    """A table: its title, a note of a few sentences, and rows of as many texts as there are columns.

    links: on an HTML page, the addresses that texts of the first column lead to.
    """

    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    links: Mapping[str, str] = field(default_factory=dict)

    def brief(self) -> Sheet:
        """The table with the brief columns alone."""
        kept = [index for index, column in enumerate(self.columns) if column.brief]
        rows = tuple(tuple(row[index] for index in kept) for row in self.rows)
        return Sheet(self.title, self.note, tuple(self.columns[index] for index in kept), rows, self.links)


def millions(macs: float, deviation: float | None = None) -> str:
    """Multiply-adds with three digits and the deviation with as many decimals: 368M, 5.96M ± 0.07M."""
    decimals = max(0, 3 - len(str(int(macs / 1e6)))) if macs >= 1e6 else 3
    text = f"{macs / 1e6:.{decimals}f}M"
    return f"{text} ± {deviation / 1e6:.{decimals}f}M" if deviation else text


def duration(seconds: float) -> str:
    """The time in a unit that gives it two to four digits."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def result_sheets(sections: Iterable[Section]) -> list[Sheet]:
    """Each section's rows: a table for classification, one for regression; the paper beside whole data sets."""
    sheets = []
    for section in sections:
        for names in (("error",), ("mse", "mae")):
            groups = [group for group in section.groups if group.errors == names]
            if groups:
                sheets.append(_result_sheet(section, groups, names))
    return sheets


def _result_sheet(section: Section, groups: Sequence[Group], names: Sequence[str]) -> Sheet:
    columns = [Column("row", right=False), Column("n"), Column("seeds", brief=False)]
    for name in names:
        columns.append(Column(ERROR_TITLES[name]))
        if section.whole:
            columns += [Column(f"paper's {_NAMES[name]}"), Column("difference")]
    columns.append(Column(f"lowest {ERROR_TITLES[names[0]]} of an epoch", brief=False))
    columns.append(Column("multiply-adds"))
    if section.whole:
        columns += [Column("paper's multiply-adds"), Column("from paper's", brief=False)]
    columns.append(Column("times fewer"))
    columns.append(Column("parameters", brief=False))
    if section.whole:
        columns.append(Column("paper's parameters", brief=False))
    columns += [Column("training time", brief=not (section.whole and len(names) > 1)), Column("wall time", brief=False)]
    columns += [Column("precision, device", right=False, brief=False), Column("remarks", right=False, brief=False)]
    title = section.title
    if len(names) > 1:
        title += " (regression)"
    if section.whole:
        note = (
            "Mean and sample standard deviation over the seeds, of the last epoch's model unless a row says otherwise; "
            "times fewer multiply-adds than the dense network. "
            "The paper's counts of targeted networks are lower than an exact count by its counter (docs/method.md)."
        )
    else:
        note = (
            "These results do not compare with published ones, nor with those on whole data sets. Mean and sample "
            "standard deviation over the seeds; times fewer multiply-adds than the dense network."
        )
    return Sheet(title, note, tuple(columns), tuple(_result_row(group, section.whole, names) for group in groups))


def _result_row(group: Group, whole: bool, names: Sequence[str]) -> tuple[str, ...]:
    paper, common = group.paper, group.common
    cells = [group.label, str(len(group.runs)), ", ".join(map(str, group.seeds))]
    for name in names:
        ours = group.statistic(name)
        assert ours is not None
        cells.append(plus_minus(ours, name))
        if whole:
            theirs = paper.errors[name] if paper else None
            cells += ["", ""] if theirs is None else [f"{theirs:.2f}", f"{ours.mean - theirs:+.2f}"]
    best = group.statistic(f"best_{names[0]}")
    cells.append(plus_minus(best, names[0]) if best else "")
    macs = group.statistic("macs_roi")
    assert macs is not None
    cells.append(millions(macs.mean, macs.deviation))
    if whole:
        cells += [f"{paper.macs:g}M", f"{macs.mean / paper.macs / 1e4 - 100:+.1f} %"] if paper else ["", ""]
    cells += [f"{group.times_fewer:.2f}", f"{common['parameters']:,}"]
    if whole:
        cells.append(paper.parameters if paper else "")
    for key in ("train_seconds", "wall_seconds"):
        seconds = group.statistic(key)
        cells.append(duration(seconds.mean) if seconds else "")
    remarks = [f"the best epoch's model ({common['best_chosen_on']})"] if group.first.tests_best else []
    cells += ["; ".join(group.devices), "; ".join([*remarks, *group.remarks])]
    return tuple(cells)


def left_out_sheet(runs: Iterable[Run]) -> Sheet | None:
    """The runs that are in no row, and why."""
    rows = tuple(
        (run.name, run.state, "; ".join([run.reason, *run.remarks])) for run in runs if run.state != "finished"
    )
    if not rows:
        return None
    columns = (Column("folder", right=False), Column("state", right=False), Column("reason", right=False))
    return Sheet("Runs that are not counted", "No figure above has a part of these.", columns, rows)


def remarks_sheet(runs: Iterable[Run]) -> Sheet | None:
    """What is to be known of runs that are counted, beyond what data they used."""
    rows = tuple(
        (run.name, remark)
        for run in runs
        for remark in run.remarks
        if run.state == "finished" and not remark.startswith("not the whole data set")
    )
    if not rows:
        return None
    columns = (Column("folder", right=False), Column("remark", right=False))
    return Sheet("Remarks on counted runs", "", columns, rows)


def milliseconds(seconds: float) -> str:
    """Three digits, without an exponent."""
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:#.3g}"


def timings_sheet(timings: Mapping[str, Any]) -> Sheet:
    """A row for every timed network (see `tkn.report.timing`)."""
    dense = {row["key"]: row["seconds"]["median"] for row in timings["rows"] if row["folder"] is None}
    rows = []
    for row in timings["rows"]:
        seconds = row["seconds"]
        low, middle, high = (milliseconds(seconds[key]) for key in ("q1", "median", "q3"))
        faster = f"{dense[row['key']] / seconds['median']:.2f}"
        rows.append((row["model"], row["folder"] or "dense", millions(row["macs"]), middle, f"{low} to {high}", faster))
    machine = timings["machine"]
    by_torch = "" if timings["kernels"] else " The engine's kernels could not be compiled: torch computed."
    note = (
        f"tkn.accelerate, batch {timings['batch_size']}, threads: {timings['threads']}, {machine['cpu']}; "
        f"all networks in turns in one process, torch {timings['torch']}; CPUs that other processes kept busy "
        f"meanwhile: {timings['other_load']}.{by_torch}"
    )
    columns = (
        *(Column("network", right=False), Column("run", right=False), Column("multiply-adds")),
        *(Column("median (ms)"), Column("quartiles (ms)"), Column("times faster than dense")),
    )
    return Sheet("Measured inference", note, columns, tuple(rows))
