"""Fills the page of the comparison and draws its figure:

    python -m tkn.report.pays results docs/pays.md

Between `<!-- pays verdicts -->` and `<!-- end -->` stands the table of verdicts, between `<!-- pays figure -->` and
`<!-- end -->` the figure, and between `<!-- pays casting -->` and `<!-- end -->` what was run of that set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tkn.app.files import write_whole
from tkn.app.plain_command import run_plain
from tkn.report.pays.figure import draw_figure, save_picture
from tkn.report.pays.page import FIGURE, fill
from tkn.report.pays.study import read_study

_NAME = "tkn.report.pays"


def main(arguments: list[str] | None = None) -> None:
    """Fill the page in place; exit status 1 and one line on stderr if it fails (130 on Ctrl-C)."""
    parser = argparse.ArgumentParser(prog=f"python -m {_NAME}", description="Fill the page of the comparison.")
    parser.add_argument("results", type=Path, help="the folder of results/pays_<set>_<network>/seed<N>")
    parser.add_argument("page", type=Path, help=f"the Markdown file; its figure is {FIGURE} beside it")
    parser.add_argument(
        "--timings",
        type=Path,
        default=Path("benchmarks/pays"),
        help="the folder of the files of benchmarks/pays.py (benchmarks/pays)",
    )
    parsed = parser.parse_args(arguments)

    def work() -> int:
        study = read_study(parsed.results, parsed.timings)
        filled = fill(parsed.page.read_text(encoding="utf-8"), study, parsed.page)
        picture = parsed.page.parent / FIGURE
        if any(found.groups for found in study.sets.values()):
            picture.parent.mkdir(exist_ok=True)
            save_picture(draw_figure(list(study.sets.values())), picture)
        else:
            picture.unlink(missing_ok=True)
        write_whole(parsed.page, filled)
        return 0

    run_plain(_NAME, work)


if __name__ == "__main__":
    main()
