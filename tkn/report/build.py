"""From folders of runs to a report's folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from tkn.app.files import write_whole
from tkn.report.document import Document, html, markdown
from tkn.report.figures.pictures import attention_picture, attention_pictures, sample_pictures, tradeoff_pictures
from tkn.report.kernels.pages import kernel_pages
from tkn.report.runs.collect import collect
from tkn.report.runs.folds import CrossValidated, cross_validated
from tkn.report.runs.groups import Section, sections
from tkn.report.runs.run import Run
from tkn.report.tables.folds import fold_sheets, folds_csv
from tkn.report.tables.formats import groups_csv, runs_csv, terminal_table
from tkn.report.tables.sheets import left_out_sheet, remarks_sheet, result_sheets, timings_sheet
from tkn.report.timing import measure_timings, read_timings

_FOLDS = "cross_validation.csv"


def build_report(
    paths: Sequence[Path],
    folder: Path,
    data_dir: Path,
    console: Console,
    time_batch: int | None = None,
    kernel_images: int | None = None,
) -> list[Path]:
    """Write the report on all runs below the paths, and print its tables; returns the files written.

    `time_batch`: measure the networks' inference at this batch size too; None keeps the timings of an earlier report.
    `kernel_images`: write pages of what kernels look at too, with so many test images; None leaves an earlier report's.
    FileNotFoundError if a path is not there or no path holds a run.
    """
    runs, empty = collect(paths)
    if not runs:
        raise FileNotFoundError(f"no run in {', '.join(map(str, paths))}: nothing to report")
    rows, crossed = sections(runs), cross_validated(runs)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    notes = [f"{path} holds no run." for path in empty]
    if time_batch is not None:
        notes += measure_timings(runs, time_batch, folder)
    timings = None
    try:
        timings = read_timings(folder)
    except ValueError as error:
        notes.append(f"{error}; measure anew with --time")

    pictures = [
        attention_picture(figures),
        *sample_pictures(runs, data_dir, figures, notes),
        *attention_pictures(rows, figures, notes),
        *tradeoff_pictures(rows, timings, folder, figures),
    ]
    written = [path for picture in pictures for path in (picture.path, *picture.others)]
    _remove_stale(figures, written)
    pages = {} if kernel_images is None else kernel_pages(rows, folder, data_dir, kernel_images, console, notes)

    extra = [left_out_sheet(runs), remarks_sheet(runs), timings_sheet(timings) if timings else None]
    sheets = [*result_sheets(rows), *fold_sheets(crossed), *(sheet for sheet in extra if sheet is not None)]
    links = [(title, made[0].name) for title, made in pages.items()]
    document = Document(list(_lead(runs, rows, crossed)), sheets, pictures, notes, links=links)
    texts = {
        "report.html": html(document),
        "report.md": markdown(document, folder),
        "runs.csv": runs_csv(
            runs, [*(group for section in rows for group in section.groups), *(r.whole for r in crossed)]
        ),
        "groups.csv": groups_csv(rows),
        **({_FOLDS: folds_csv(crossed)} if crossed else {}),
    }
    if not crossed:
        (folder / _FOLDS).unlink(missing_ok=True)
    for name, text in texts.items():
        write_whole(folder / name, text)

    for sheet in sheets:
        console.print(terminal_table(sheet))
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    measured = [folder / "timings.json"] if time_batch is not None and timings else []
    return [
        *(folder / name for name in texts),
        *measured,
        *written,
        *(path for made in pages.values() for path in made),
    ]


def _lead(runs: Sequence[Run], rows: Sequence[Section], crossed: Sequence[CrossValidated]) -> Iterator[str]:
    """How many runs there are and what they came to."""
    states = Counter(run.state for run in runs)
    counted = states.pop("finished", 0)
    count = sum(len(section.groups) for section in rows)
    left_out = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
    over_folds = f" and {_plural(len(crossed), 'row')} of runs that differ in the fold too" if crossed else ""
    yield (
        f"{_plural(len(runs), 'run')} found, {counted} counted in {_plural(count, 'row')} of runs that differ only in "
        f"the seed{over_folds}{f'; not counted: {left_out}' if left_out else ''}."
    )
    whole = sum(len(group.runs) for section in rows if section.whole for group in section.groups)
    if counted:
        yield (
            f"{whole} of the counted runs used whole data sets. Only these stand beside the paper's figures; runs on "
            "parts, on folds or on other data have tables of their own."
        )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _remove_stale(figures: Path, written: Sequence[Path]) -> None:
    """Remove figures of an earlier report that this one has not drawn again."""
    for path in figures.glob("figure[2345]_*"):
        if path.suffix in (".png", ".pdf", ".gif") and path not in written:
            path.unlink()
