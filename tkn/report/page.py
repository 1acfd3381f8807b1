"""Fills the tables of a Markdown page with recorded runs, next to the paper's figures:

    python -m tkn.report.page results docs/results.md

Between `<!-- paper 2 -->` and `<!-- end -->` stand the rows of the paper's Table 2 with the runs in
results/<experiment>/, or "not run"; between `<!-- claims 2 -->` and `<!-- end -->` what its targeted rows claim against
the dense one, with `all` every claim of the paper; between `<!-- figure 4 -->` and `<!-- end -->` its Figure 4 or 5;
between `<!-- runs factors -->` and `<!-- end -->` all runs in results/factors/; between `<!-- against one,two -->` and
`<!-- end -->` the runs in results/one/ and results/two/, with the differences from those of the first; between
`<!-- folds kfold -->` and `<!-- end -->` the cross-validated rows of the runs in results/kfold*/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tkn.app.command import one_line
from tkn.app.files import write_whole
from tkn.report import figure4, figure5
from tkn.report.author_count import author_count
from tkn.report.blocks import fill_blocks
from tkn.report.claims import claims_table, paper_rows, recorded, row_name
from tkn.report.compare import Pair, best_pair, half_width, plus_half
from tkn.report.runs.collect import collect
from tkn.report.runs.folds import cross_validated
from tkn.report.runs.groups import Group, Statistic, composed, plus_minus
from tkn.report.tables.folds import fold_sheets
from tkn.report.tables.formats import markdown_rows, seed_links
from tkn.report.tables.sheets import Column, duration, millions
from tkn.report.verdicts import verdicts_table
from tkn.training.compose import TKN_RUN

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

    def tables(kind: str, name: str) -> str:
        if kind == "runs":
            return _runs_tables(results / name, page)
        if kind == "against":
            return _against_tables(name.split(","), results, page)
        if kind == "folds":
            return _folds_tables(name, results, page)
        if kind == "figure":
            return _figure(name, results, page)
        if name == "all":
            return verdicts_table(results)
        return _paper_tables(int(name), results, page) if kind == "paper" else claims_table(int(name), results)

    return fill_blocks(text, ("paper", "claims", "runs", "against", "figure", "folds"), tables)


def _figure(number: str, results: Path, page: Path) -> str:
    """The paper's Figure 4 or 5 with recorded runs."""
    picture = page.parent / "images" / f"results_figure{number}.png"
    shown = picture.relative_to(page.parent) if picture.is_file() else None
    if number == "5":
        return figure5.table(results, shown)
    if number != "4":
        raise ValueError(f"there are Figures 4 and 5 of runs, not {number}")
    columns = (Column("map", right=False), Column("what", right=False), *_FIGURES)
    rows = []
    for letter, (experiment, what) in figure4.RUNS.items():
        groups = recorded(results / experiment)
        rows += [(f"({letter})", what, *_figures(group, page)) for group in groups]
        if not groups:
            rows.append((f"({letter})", what, *_NOT_RUN))
    image = [f"![Attention maps of TDN10's six target layers]({shown})\n"] if shown else []
    return "\n".join([*image, markdown_rows(columns, rows)])


_FIGURES = (Column("error (%)"), Column("95 %"), Column("multiply-adds"), Column("n"), Column("seeds"))
_NOT_RUN = ("not run", *[""] * (len(_FIGURES) - 1))
_DETAILS = (
    *(Column("lowest of an epoch"), Column("by the author's counter"), Column("precision, device", right=False)),
    *(Column("time a run"), Column("command", right=False)),
)


def _paper_tables(number: int, results: Path, page: Path) -> str:
    columns = (Column("row", right=False), Column("paper's error (%)"), Column("paper's multiply-adds"), *_FIGURES)
    rows, details = [], []
    for name, paper in paper_rows(number).items():
        label, figures = row_name(paper), (f"{paper.errors['error']:.2f}", f"{paper.macs:g}M")
        groups = recorded(results / name)
        rows += [(label, *figures, *_figures(group, page)) for group in groups]
        details += [(label, *_details(group)) for group in groups]
        if not groups:
            rows.append((label, *figures, *_NOT_RUN))
    return _with_details(columns, rows, details)


def _runs_tables(folder: Path, page: Path) -> str:
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist")
    groups = recorded(folder)
    if not groups:
        raise ValueError(f"{folder} holds no finished run")
    names = [group.first.folder.parent.name for group in groups]
    rows = [(name, *_figures(group, page)) for name, group in zip(names, groups, strict=True)]
    details = [(name, *_details(group)) for name, group in zip(names, groups, strict=True)]
    return _with_details((Column("runs", right=False), *_FIGURES), rows, details)


def _against_tables(experiments: Sequence[str], results: Path, page: Path) -> str:
    """The rows of the experiments, each but the first one's held against the first's."""
    recorded_rows = {name: recorded(results / name) for name in experiments}
    firsts = recorded_rows[experiments[0]]
    columns = (Column("runs", right=False), *_FIGURES, Column("share"), Column("difference, 95 %"))
    rows, details = [], []
    for name, groups in recorded_rows.items():
        for group in groups:
            pair = best_pair([group], firsts)
            against = ("", "") if pair is None or groups is firsts else _against(pair)
            rows.append((name, *_figures(group, page), *against))
            details.append((name, *_details(group)))
        if not groups:
            rows.append((name, *_NOT_RUN, "", ""))
    return _with_details(columns, rows, details)


def _against(pair: Pair) -> tuple[str, str]:
    """The part of the other's multiply-adds, and the difference of the errors."""
    ours, theirs = pair.one.statistic("macs_roi"), pair.other.statistic("macs_roi")
    assert ours is not None
    assert theirs is not None
    conditions = f" ({pair.conditions})" if pair.conditions else ""
    between = plus_half(*pair.difference(pair.one.errors[0]))
    return f"{100 * ours.mean / theirs.mean:.0f} %", between + conditions


def _folds_tables(prefix: str, results: Path, page: Path) -> str:
    """The cross-validated rows of the experiments whose names begin so."""
    runs, _ = collect(sorted(path for path in results.glob(f"{prefix}*") if path.is_dir()))
    sheets = fold_sheets(cross_validated(runs), partial(seed_links, page=page))
    if not sheets:
        return f"Not run: no folder {prefix}* holds a finished run on a fold.\n"
    return "\n".join(f"{sheet.note}\n\n{markdown_rows(sheet.columns, sheet.rows)}" for sheet in sheets)


def _with_details(columns: Sequence[Column], rows: Sequence[Sequence[str]], details: Sequence[Sequence[str]]) -> str:
    """A table, and under it what not everybody asks for, folded away."""
    if not details:
        return markdown_rows(columns, rows)
    folded = markdown_rows((columns[0], *_DETAILS), details)
    return (
        f"{markdown_rows(columns, rows)}\n<details><summary>commands, devices, times, lowest errors</summary>\n\n"
        f"{folded}\n</details>\n"
    )


def _figures(group: Group, page: Path) -> tuple[str, ...]:
    (name,) = group.errors
    error, macs, clipped = (group.statistic(key) for key in (name, "macs_roi", f"{name}_clipped"))
    assert error is not None
    assert macs is not None
    half = half_width(error)
    return (
        plus_minus(error, name) + (f" (clipped: {plus_minus(clipped, name)})" if clipped else ""),
        "" if half is None else f"± {half:.2f}",
        millions(macs.mean, macs.deviation),
        *(str(len(group.runs)), seed_links(group, page)),
    )


def _details(group: Group) -> tuple[str, ...]:
    (name,) = group.errors
    best, macs, seconds = (group.statistic(key) for key in (f"best_{name}", "macs_roi", "wall_seconds"))
    assert best is not None
    assert seconds is not None
    counted = Statistic.of([author_count(run) for run in group.runs]) if group.targeted else macs
    assert counted is not None
    return (
        plus_minus(best, name) + (" (held-out images)" if group.first.tests_best else ""),
        millions(counted.mean, counted.deviation),
        *("; ".join(group.devices), duration(seconds.mean)),
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
            if key.startswith(TKN_RUN.open_keys):  # the others came into being after the run
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
