"""What the paper claims of its targeted networks, and whether recorded runs bear it out."""

from __future__ import annotations

from pathlib import Path

from tkn.models import BASE
from tkn.report.compare import Pair, best_pair, plus_half
from tkn.report.paper import PAPER, PaperRow
from tkn.report.runs.collect import collect
from tkn.report.runs.groups import Group, sections
from tkn.report.tables.formats import markdown_rows
from tkn.report.tables.sheets import Column

_COLUMNS = (
    *(Column("row", right=False), Column("the paper", right=False), Column("here", right=False)),
    *(Column("difference here, 95 %"), Column("n"), Column("lower error here?", right=False)),
    Column("computed differently", right=False),
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


def claims_table(number: int, results: Path) -> str:
    """Markdown: each targeted row of the paper's table against its dense one, as published and as recorded."""
    rows = paper_rows(number)
    dense = {name: row for name, row in rows.items() if row.attention is None}
    lines = []
    for name, row in rows.items():
        if row.attention is None:
            continue
        base, published = next((n, d) for n, d in dense.items() if d.model == BASE[row.model])
        claim = f"{row_name(row)}, against {row_name(published)}"
        said = _figures(row.errors["error"], published.errors["error"], published.macs / row.macs)
        pair = best_pair(recorded(results / name), recorded(results / base))
        here = ("not run", "", "", "", "") if pair is None else _here(pair)
        lines.append((claim, said, *here))
    return markdown_rows(_COLUMNS, lines)


def _figures(targeted: float, dense: float, fewer: float) -> str:
    return f"{targeted:.2f} against {dense:.2f} %, {fewer:.1f} times fewer"


def _here(pair: Pair) -> tuple[str, ...]:
    ours, theirs = pair.one.statistic("error"), pair.other.statistic("error")
    assert ours is not None
    assert theirs is not None
    between, half = pair.difference("error")
    figures = _figures(ours.mean, theirs.mean, pair.one.times_fewer)
    return figures, plus_half(between, half), pair.n, _verdict(between, half), pair.conditions


def _verdict(between: float, half: float | None) -> str:
    if half is None:
        return f"{'lower' if between < 0 else 'not lower'}, but too few seeds to tell"
    if abs(between) <= half:
        return "not shown"
    return "yes" if between < 0 else "no"
