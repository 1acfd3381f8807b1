"""The page's blocks."""

from __future__ import annotations

from pathlib import Path

from tkn.app.messages import unknown
from tkn.report.blocks import fill_blocks
from tkn.report.pays.study import Study
from tkn.report.pays.tables import set_tables, verdict_table

#: Where the figure lies, from the page's folder.
FIGURE = Path("images/pays.png")


def fill(text: str, study: Study, page: Path) -> str:
    """The page's text with its blocks made anew; links are relative to the page's folder.

    ValueError for a block of no set, and for a page that has none of a set or of the verdicts.
    """
    wanted = ("verdicts", "figure", *study.sets)
    made = []

    def block(_kind: str, name: str) -> str:
        if name not in wanted:
            raise ValueError(unknown("pays", name, wanted))
        made.append(name)
        if name == "verdicts":
            return verdict_table(study)
        return figure_block(study) if name == "figure" else set_tables(study.sets[name], page)

    filled = fill_blocks(text, ("pays",), block)
    for name in wanted:
        if name not in made:
            raise ValueError(f"{page} has no block <!-- pays {name} --> with an <!-- end -->")
    return filled


def figure_block(study: Study) -> str:
    """The figure and what it shows; without runs, that there is none."""
    run = [found for found in study.sets.values() if found.groups]
    if not run:
        return "No figure: nothing was run.\n"
    missing = [name for name, found in study.sets.items() if not found.groups]
    without = f" Not run: {', '.join(missing)}." if missing else ""
    return (
        f"![Error against multiply-adds and against milliseconds, two panels a data set]({FIGURE.as_posix()})\n\n"
        "Test error, mean and its 95 % interval over the seeds, against multiply-adds and against the milliseconds of "
        "a batch of 128 images by the fastest engine, with quartiles. The networks of a third of the multiply-adds "
        f"stand beside each other for legibility.{without}\n"
    )
