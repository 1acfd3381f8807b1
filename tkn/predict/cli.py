"""The command tkn-predict: what a plan says of image files."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from tkn.app.messages import printable
from tkn.app.plain_command import positive, run_plain

_NAME = "tkn-predict"


def main(arguments: list[str] | None = None) -> None:
    """Print or write what the plan says of the images; exit status 1 if an image can't be read, or it fails as a whole.

    Either with a line on stderr for each reason; 130 on Ctrl-C.
    """
    parsed = _parser().parse_args(arguments)
    run_plain(_NAME, partial(_predict, parsed))


def _predict(parsed: argparse.Namespace) -> int:
    import torch

    from tkn.app.files import write_whole
    from tkn.predict.files import answers, list_images
    from tkn.predict.output import answers_csv, answers_table
    from tkn.predict.predictor import Predictor

    paths = list_images(parsed.images)
    batch = min(parsed.batch, len(paths))
    predictor = Predictor(parsed.plan, batch, getattr(torch, parsed.dtype))
    refused: list[str] = []

    def refuse(line: str) -> None:
        refused.append(line)
        print(f"{_NAME}: {printable(line)}", file=sys.stderr)

    found = list(answers(predictor, paths, batch, parsed.top, refuse))
    if parsed.csv is not None and found:
        write_whole(parsed.csv, answers_csv(found))
        print(f"{len(found)} of {len(paths)} images in {parsed.csv}")
    elif found:
        # A file has no width to fit.
        Console(width=None if sys.stdout.isatty() else 120).print(answers_table(found))
    return 1 if refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_NAME, description="Classify image files by a plan that tkn-export wrote, or predict their number."
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="the plan's file, such as RUN/model.plan")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="an image file, or a folder of them")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the answers to a CSV file instead of a table")
    parser.add_argument("--top", type=positive, default=1, metavar="K", help="so many of the likeliest classes (1)")
    parser.add_argument("--batch", type=positive, default=128, metavar="N", help="images computed at once (128)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="numbers that are multiplied (float32); bfloat16 on CPUs that have its instructions",
    )
    return parser


if __name__ == "__main__":
    main()
