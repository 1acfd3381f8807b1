"""The command tkn-export: a finished run as a plan."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from tkn.app.plain_command import positive, run_plain

_NAME = "tkn-export"


def main(arguments: list[str] | None = None) -> None:
    """Export a run; exit status 1 and one line on stderr if it fails (130 on Ctrl-C)."""
    parsed = _parser().parse_args(arguments)
    run_plain(_NAME, partial(_export, parsed))


def _export(parsed: argparse.Namespace) -> int:
    import torch  # after the arguments: it takes seconds to import

    from tkn.export.build import Options, export

    options = Options(
        output=parsed.output or parsed.run / "model.plan",
        data_dir=parsed.data_dir,
        trust=(lambda _name: True) if parsed.trust else partial(_ask, parsed.run),
        batches=tuple(dict.fromkeys(parsed.batch)),
        dtype=getattr(torch, parsed.dtype),
        images=parsed.images,
        checked=not parsed.unchecked,
        seconds=parsed.seconds,
    )
    # A log file has no width to fit.
    console = Console(width=None if sys.stdout.isatty() else 120)
    export(parsed.run, options, console)
    console.print(f"in {options.output}", soft_wrap=True, markup=False, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_NAME, description="Write a finished run's network as a plan, checked and timed; tkn-predict uses it."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run of tkn-run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the plan's file (RUN/model.plan)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where the data sets are, or of own data their folder (TKN_DATA_DIR, else where the run found them)",
    )
    parser.add_argument("--images", type=positive, metavar="N", help="check on so many test images (all)")
    parser.add_argument(
        "--unchecked", action="store_true", help="export without the data: the plan is held against the network alone"
    )
    parser.add_argument(
        "--trust", action="store_true", help="run the code that the run names for its network or its data, unasked"
    )
    parser.add_argument(
        "--batch",
        type=positive,
        nargs="+",
        default=[1, 128],
        metavar="N",
        help="batch sizes to check and to time (1 128); the file serves others too",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="numbers that the plan is checked and timed in (float32); the file serves both",
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=1.0, metavar="S", help="time each network so long at each batch size (1)"
    )
    return parser


def _ask(run: Path, name: str) -> bool:
    """Whether whoever sits at the terminal allows it; False if nobody does."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"{_NAME}: {run} needs {name}, code that will be imported and run. Run it? [y/N] ", end="", file=sys.stderr)
    return input().strip().lower() in ("y", "yes")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


if __name__ == "__main__":
    main()
