"""The command tkn-report: tables and figures of many runs, next to the paper's."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

_NAME = "tkn-report"


def main(arguments: list[str] | None = None) -> None:
    """Report on the runs below the given folders; exit status 1 and one line on stderr if it fails (130 on Ctrl-C)."""
    parsed = _parser().parse_args(arguments)
    # After the arguments: torch takes seconds to import.
    from tkn.app.command import FULL_ERROR, one_line
    from tkn.report.build import build_report

    folder = parsed.out or (parsed.paths[0] if len(parsed.paths) == 1 else Path()) / "report"
    # A log file has no width to fit.
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        batch = parsed.batch_size if parsed.time else None
        written = build_report(parsed.paths, folder, parsed.data_dir, console, batch)
    except KeyboardInterrupt:
        print(f"{_NAME}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        sys.exit(f"{_NAME}: error: {one_line(error)}")
    names = ", ".join(path.relative_to(folder).as_posix() for path in written)
    console.print(f"in {folder}: {names}", soft_wrap=True, markup=False, highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_NAME, description="Tables and figures of the runs of tkn-run in and below folders, next to the paper's."
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a folder of runs or sweeps")
    parser.add_argument("--out", type=Path, help="the report's folder (PATH/report of one PATH, else report)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("TKN_DATA_DIR", "datasets")),
        help="where the data sets are, for samples (the environment's TKN_DATA_DIR, else datasets)",
    )
    parser.add_argument("--time", action="store_true", help="measure how fast the networks infer on this machine")
    parser.add_argument("--batch-size", type=_positive, default=128, metavar="N", help="images a batch of --time (128)")
    return parser


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return int(text)


if __name__ == "__main__":
    main()
