"""What the paper claims of its targeted networks, and whether recorded runs bear it out."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

from scipy.stats import t

from tkn.report.paper import PAPER, PaperRow
from tkn.report.runs.collect import collect
from tkn.report.runs.groups import Group, Statistic, sections
from tkn.report.tables.formats import markdown_rows
from tkn.report.tables.sheets import Column

_LEVEL = 0.95
_COLUMNS = (
    *(Column("row", right=False), Column("the paper", right=False), Column("here", right=False)),
    *(Column("difference here, 95 %"), Column("n"), Column("lower error here?", right=False)),
)


def paper_rows(number: int) -> dict[str, PaperRow]:
    """The rows of the paper's table by experiment; ValueError if it has no error rates."""
    rows = {name: row for name, row in PAPER.items() if row.table == number and "error" in row.errors}
    if not rows:
        raise ValueError(f"the paper has no error rates in a Table {number}")
    return rows


def row_name(paper: PaperRow) -> str:
    """How a table calls the row."""
    name = paper.model.upper()
    return name if paper.attention is None else f"{name}, {paper.attention.title()}, {paper.l2:g}, β = {paper.beta:g}"


def recorded(folder: Path) -> list[Group]:
    """The rows of the counted runs on whole data below the folder, by their folders' names; none without the folder.

    ValueError for a run without config.yaml.
    """
    if not folder.is_dir():
        return []
    runs, _ = collect([folder])
    groups = [group for section in sections(runs) if section.whole for group in section.groups]
    for group in groups:
        if group.first.config is None:
            raise ValueError(f"{group.first.folder} has no config.yaml: how was it made?")
    return sorted(groups, key=lambda group: group.first.folder)


def half_width(statistic: Statistic) -> float | None:
    """Half of the 95 % interval of a mean by Student's t; None of a single value."""
    if statistic.deviation is None:
        return None
    return float(t.ppf((1 + _LEVEL) / 2, statistic.n - 1)) * statistic.deviation / sqrt(statistic.n)


def difference(one: Statistic, other: Statistic) -> tuple[float, float | None]:
    """one - other: of the means, and half of its 95 % interval by Welch's t-test; None if either is a single value."""
    between = one.mean - other.mean
    if one.deviation is None or other.deviation is None:
        return between, None
    parts = [statistic.deviation**2 / statistic.n for statistic in (one, other) if statistic.deviation is not None]
    total = sum(parts)
    if total == 0:
        return between, 0.0
    freedom = total**2 / sum(part**2 / (s.n - 1) for part, s in zip(parts, (one, other), strict=True))
    return between, float(t.ppf((1 + _LEVEL) / 2, freedom)) * sqrt(total)


def claims_table(number: int, results: Path) -> str:
    """Markdown: each targeted row of the paper's table against its dense one, as published and as recorded."""
    rows = paper_rows(number)
    dense = {name: row for name, row in rows.items() if row.attention is None}
    lines = []
    for name, row in rows.items():
        if row.attention is None:
            continue
        base, published = next((n, d) for n, d in dense.items() if _is_base(d, row))
        claim = f"{row_name(row)}, against {row_name(published)}"
        said = _figures(row.errors["error"], published.errors["error"], published.macs / row.macs)
        ours, theirs = _most(results / name), _most(results / base)
        here = ("not run", "", "", "") if ours is None or theirs is None else _here(ours, theirs)
        lines.append((claim, said, *here))
    return markdown_rows(_COLUMNS, lines)


def _is_base(dense: PaperRow, targeted: PaperRow) -> bool:
    return {"cnn6": "tkn6"}.get(dense.model, f"t{dense.model}") == targeted.model


def _most(folder: Path) -> Group | None:
    """Of the rows of an experiment that of the most seeds."""
    return max(recorded(folder), key=lambda group: len(group.runs), default=None)


def _figures(targeted: float, dense: float, fewer: float) -> str:
    return f"{targeted:.2f} against {dense:.2f} %, {fewer:.1f} times fewer"


def _here(targeted: Group, dense: Group) -> tuple[str, ...]:
    ours, theirs = targeted.statistic("error"), dense.statistic("error")
    assert ours is not None
    assert theirs is not None
    between, half = difference(ours, theirs)
    text = f"{between:+.2f}" + ("" if half is None else f" ± {half:.2f}")
    figures = _figures(ours.mean, theirs.mean, targeted.times_fewer)
    return figures, text, f"{ours.n}, {theirs.n}", _verdict(between, half)


def _verdict(between: float, half: float | None) -> str:
    if half is None:
        return f"{'lower' if between < 0 else 'not lower'}, but too few seeds to tell"
    if abs(between) <= half:
        return "not shown"
    return "yes" if between < 0 else "no"
