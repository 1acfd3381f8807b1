"""The report's tables for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from tkn.app.files import csv_text
from tkn.app.messages import printable
from tkn.app.schema import flatten
from tkn.report.runs.groups import Group, Section
from tkn.report.runs.run import Run
from tkn.report.tables.sheets import Column, Sheet


def terminal_table(sheet: Sheet) -> Table:
    """The brief columns."""
    brief = sheet.brief()
    title = escape(printable(brief.title))
    table = Table(title=title, title_justify="left", caption=escape(brief.note), caption_justify="left")
    for index, column in enumerate(brief.columns):
        # Numbers stay whole; texts give way.
        words = [*column.heading.split(), *(row[index] for row in brief.rows)] if column.right else [""]
        justify: Literal["left", "right"] = "right" if column.right else "left"
        table.add_column(column.heading, justify=justify, overflow="fold", min_width=max(map(len, words)))
    for row in brief.rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    return table


def markdown_table(sheet: Sheet) -> str:
    """A heading, the note and the whole table."""
    lines = [f"## {sheet.title}", ""]
    if sheet.note:
        lines += [sheet.note, ""]
    return "\n".join(lines) + "\n" + markdown_rows(sheet.columns, sheet.rows)


def markdown_rows(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """The table alone."""
    lines = [_markdown_row([column.heading for column in columns])]
    lines.append(_markdown_row(["---:" if column.right else "---" for column in columns]))
    lines += [_markdown_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def seed_links(group: Group, page: Path) -> str:
    """The row's seeds, each a link from a Markdown page to its run's summary."""
    folders = {run.result["seed"]: os.path.relpath(run.folder, page.parent) for run in group.runs}
    return ", ".join(f"[{seed}]({folder}/summary.json)" for seed, folder in folders.items())


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"


def runs_csv(runs: Iterable[Run], groups: Iterable[Group]) -> str:
    """A row for every run: its folder, state, reason, remarks, row in the tables, and all scalars of its summary."""
    labels = {run.folder: group.label for group in groups for run in group.runs}
    rows: list[dict[str, Any]] = []
    for run in runs:
        scalars = {key: value for key, value in flatten(run.summary or {}).items() if not isinstance(value, list)}
        begin = {"folder": run.name, "state": run.state, "counted": run.state == "finished"}
        notes = {"reason": run.reason, "remarks": "; ".join(run.remarks), "row": labels.get(run.folder, "")}
        rows.append({**begin, **notes, **scalars})
    return csv_text(rows)


def groups_csv(sections: Iterable[Section]) -> str:
    """A row for every row of the tables: settings, means and deviations, and the paper's figures as plain numbers."""
    rows: list[dict[str, Any]] = []
    for section in sections:
        for group in section.groups:
            common, paper = group.common, group.paper
            row: dict[str, Any] = {"row": group.label, "whole_data": section.whole}
            row |= {key: common[key] for key in ("model", "data", "data_source")}
            row |= {key: (common.get("attention") or {}).get(name) for key, name in _ATTENTION.items()}
            row |= {key: group.first.shrunk_by.get(key) for key in ("l2", "beta", "asked")}
            row |= {"fixed_rois": (common.get("rois") or {}).get("places")}
            row |= {"n": len(group.runs), "seeds": " ".join(map(str, group.seeds))}
            for key in _STATISTICS:
                statistic = group.statistic(key)
                row[f"{key}_mean"] = statistic and statistic.mean
                row[f"{key}_sd"] = statistic and statistic.deviation
            row |= {"times_fewer": group.times_fewer, "macs_dense": common["macs_dense"]}
            row |= {"parameters": common["parameters"], "devices": "; ".join(group.devices)}
            row |= {"paper_experiment": group.experiment}
            row |= {f"paper_{name}": paper.errors.get(name) if paper else None for name in ("error", "mse", "mae")}
            row |= {"paper_macs": round(paper.macs * 1e6) if paper else None}
            row |= {"paper_parameters": paper.parameters if paper else None, "remarks": "; ".join(group.remarks)}
            rows.append(row)
    return csv_text(rows)


_ATTENTION = {"attention": "name", "scale_unit": "scale_unit", "min_size": "min_size", "clip": "clip"}
_STATISTICS = (
    *("error", "error_clipped", "mse", "mse_clipped", "mae", "mae_clipped", "best_error", "best_mse"),
    *("macs_roi", "epochs", "train_seconds", "wall_seconds"),
)
