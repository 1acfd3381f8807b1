"""Fills the tables of a Markdown page with recorded runs, next to the paper's figures:

    python -m tkn.report.page results docs/results.md

Between `<!-- paper 2 -->` and `<!-- end -->` stand the rows of the paper's Table 2 with the runs in
results/<experiment>/, or "not run"; between `<!-- runs factors -->` and `<!-- end -->` all runs in results/factors/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tkn.app.command import one_line
from tkn.app.files import write_whole
from tkn.report.author_count import author_count
from tkn.report.paper import PAPER, PaperRow
from tkn.report.runs.collect import collect
from tkn.report.runs.groups import Group, Statistic, composed, plus_minus, sections
from tkn.report.tables.formats import markdown_rows
from tkn.report.tables.sheets import Column, duration, millions

_BLOCK = re.compile(r"(<!-- (paper|runs) (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
#: Keys that a command need not repeat: where a run was, and what it showed.
_NOT_SAID = (
    "seed",
    "data_dir",
    "checkpoint",
    "experiment",
    "logger.",
    "trainer.accelerator",
    "trainer.enable_progress",
)
#: Whole groups that a command may name instead of their keys.
_SHORTHANDS: tuple[tuple[str, ...], ...] = ((), ("trainer=fast",))


def fill(text: str, results: Path, page: Path) -> str:
    """The page's text with its tables made anew of the runs below `results`; links are relative to the page's folder.

    ValueError for a table that the paper does not have, a folder without counted runs, or a run without config.yaml.
    """

    def block(match: re.Match[str]) -> str:
        begin, kind, name, before, end = match.groups()
        if "<!--" in before:
            raise ValueError(f"{begin.strip()} has no end before the next")
        table = _paper_table(int(name), results, page) if kind == "paper" else _runs_table(results / name, page)
        return f"{begin}\n{table}\n{end}"

    return _BLOCK.sub(block, text)


_COLUMNS = (
    *(Column("error (%)"), Column("lowest of an epoch"), Column("multiply-adds"), Column("by the author's counter")),
    *(Column("n"), Column("seeds"), Column("precision, device", right=False), Column("time a run")),
    Column("command", right=False),
)


def _paper_table(number: int, results: Path, page: Path) -> str:
    experiments = {name: row for name, row in PAPER.items() if row.table == number and "error" in row.errors}
    if not experiments:
        raise ValueError(f"the paper has no error rates in a Table {number}")
    columns = (Column("row", right=False), Column("paper's error (%)"), Column("paper's multiply-adds"), *_COLUMNS)
    rows = []
    for name, paper in experiments.items():
        figures = (f"{paper.errors['error']:.2f}", f"{paper.macs:g}M")
        groups = _groups(results / name) if (results / name).is_dir() else []
        ours = [_cells(group, page) for group in groups] or [("not run", *[""] * (len(_COLUMNS) - 1))]
        rows += [(_row_name(paper), *figures, *cells) for cells in ours]
    return markdown_rows(columns, rows)


def _runs_table(folder: Path, page: Path) -> str:
    groups = _groups(folder)
    if not groups:
        raise ValueError(f"{folder} holds no finished run")
    columns = (Column("runs", right=False), *_COLUMNS)
    return markdown_rows(columns, [(group.first.folder.parent.name, *_cells(group, page)) for group in groups])


def _row_name(paper: PaperRow) -> str:
    name = paper.model.upper()
    return name if paper.attention is None else f"{name}, {paper.attention.title()}, {paper.l2:g}, β = {paper.beta:g}"


def _groups(folder: Path) -> list[Group]:
    """The rows of the counted runs on whole data below the folder, in the order of their folders' names."""
    runs, _ = collect([folder])
    groups = [group for section in sections(runs) if section.whole for group in section.groups]
    for group in groups:
        if group.first.config is None:
            raise ValueError(f"{group.first.folder} has no config.yaml: how was it made?")
    return sorted(groups, key=lambda group: group.first.folder)


def _cells(group: Group, page: Path) -> tuple[str, ...]:
    (name,) = group.errors
    statistics = [group.statistic(key) for key in (name, f"best_{name}", "macs_roi", "wall_seconds")]
    error, best, macs, seconds = (statistic for statistic in statistics if statistic is not None)
    clipped = group.statistic(f"{name}_clipped")
    counted = Statistic.of([author_count(run) for run in group.runs]) if group.targeted else macs
    links = [f"[{run.result['seed']}]({os.path.relpath(run.folder, page.parent)}/summary.json)" for run in group.runs]
    return (
        plus_minus(error, name) + (f" (clipped: {plus_minus(clipped, name)})" if clipped else ""),
        plus_minus(best, name) + (" (held-out images)" if group.first.tests_best else ""),
        *(millions(macs.mean, macs.deviation), millions(counted.mean, counted.deviation)),
        *(str(len(group.runs)), ", ".join(links), "; ".join(group.devices), duration(seconds.mean)),
        f"`{_command(group)}`",
    )


def _command(group: Group) -> str:
    """What makes these runs: the shortest of the experiment or the network and data, and what differs from these."""
    configs = [run.config for run in group.runs if run.config is not None]
    # They differ in the seed, and in whether an experiment was named, which says most in least words.
    config = next((config for config in configs if config["experiment"] is not None), configs[0])
    begin = ["model", "data"] if config["experiment"] is None else ["experiment"]
    named = [f"{key}={config[key if key == 'experiment' else f'{key}.name']}" for key in begin]
    commands = [[*named, *shorthand, *_differences([*named, *shorthand], config)] for shorthand in _SHORTHANDS]
    seeds = f"seed={','.join(map(str, group.seeds))}"
    return " ".join(["tkn-run", *["-m"] * (len(group.seeds) > 1), *min(commands, key=len), seeds])


def _differences(arguments: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    named = composed(*arguments)
    differences = []
    for key in {**named, **config}:
        if key.startswith(_NOT_SAID):
            continue
        if key not in config:
            differences.append(f"~{key}")
        elif key not in named or named[key] != config[key]:
            differences.append(f"{'' if key in named else '+'}{key}={_override_value(config[key])}")
    return differences


def _override_value(value: Any) -> str:
    """A value as an override has it on a shell's command line."""
    if isinstance(value, list):
        return f"'[{','.join(map(_override_value, value))}]'"
    return str(value) if isinstance(value, str | float) else json.dumps(value)


def main(arguments: list[str] | None = None) -> None:
    """Fill the page's tables in place; exit status 1 and one line on stderr if it fails."""
    parser = argparse.ArgumentParser(prog="python -m tkn.report.page", description="Fill a page's tables with runs.")
    parser.add_argument("results", type=Path, help="the folder of recorded runs")
    parser.add_argument("page", type=Path, help="the Markdown file")
    parsed = parser.parse_args(arguments)
    try:
        filled = fill(parsed.page.read_text(encoding="utf-8"), parsed.results, parsed.page)
        write_whole(parsed.page, filled)
    except (OSError, ValueError) as error:
        sys.exit(f"tkn.report.page: error: {one_line(error)}")


if __name__ == "__main__":
    main()
