"""Answers as a table for people, and as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from tkn.app.files import csv_text
from tkn.app.messages import printable
from tkn.predict.files import Answer


def answers_table(answers: Sequence[Answer]) -> Table:
    """A row a file."""
    rows = [_cells(answer) for answer in answers]
    table = Table()
    for heading in rows[0]:
        number = heading.startswith(("score", "value"))
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else escape(cell) for cell in row.values()))
    return table


def answers_csv(answers: Iterable[Answer]) -> str:
    """A row a file: file, class, score, and class_2, score_2 ... if more were asked for; or file, value."""
    return csv_text([{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in _cells(a).items()} for a in answers])


def _cells(answer: Answer) -> dict[str, Any]:
    cells: dict[str, Any] = {"file": printable(str(answer.path))}
    if answer.value is not None:
        cells["value"] = answer.value
    for place, (name, score) in enumerate(answer.ranked, 1):
        suffix = "" if place == 1 else f"_{place}"
        cells |= {f"class{suffix}": name, f"score{suffix}": score}
    return cells
