"""The command tkn-report: tables and figures of many runs, next to the paper's."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from tkn.app.memory import keep_freed_memory
from tkn.app.plain_command import positive, run_plain

_NAME = "tkn-report"


def main(arguments: list[str] | None = None) -> None:
    """Report on the runs below the given folders; exit status 1 and one line on stderr if it fails (130 on Ctrl-C)."""
    parsed = _parser().parse_args(arguments)
    run_plain(_NAME, partial(_report, parsed))


def _report(parsed: argparse.Namespace) -> int:
    from tkn.report.build import build_report  # after the arguments: torch takes seconds to import

    folder = parsed.out or (parsed.paths[0] if len(parsed.paths) == 1 else Path()) / "report"
    # A log file has no width to fit.
    console = Console(width=None if sys.stdout.isatty() else 120)
    batch = parsed.batch_size if parsed.time else None
    images = parsed.images if parsed.kernels else None
    if parsed.kernels:
        keep_freed_memory()
    written = build_report(parsed.paths, folder, parsed.data_dir, console, batch, images)
    names = ", ".join(path.relative_to(folder).as_posix() for path in written)
    console.print(f"in {folder}: {names}", soft_wrap=True, markup=False, highlight=False)
    return 0


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
    parser.add_argument("--batch-size", type=positive, default=128, metavar="N", help="images a batch of --time (128)")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="pages of what the networks' kernels look at: needs their checkpoints and data, and minutes of computing",
    )
    parser.add_argument("--images", type=positive, default=1000, metavar="N", help="test images of --kernels (1000)")
    return parser


if __name__ == "__main__":
    main()
