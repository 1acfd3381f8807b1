"""Which runs of a folder results/<experiment>/seed<N> come next."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from tkn.app.command import CONFIG_DIR
from tkn.macs import count_macs
from tkn.models import build_model
from tkn.models.paper import PAPER
from tkn.training.compose import compose
from tkn.training.config import check_config


class _Images(NamedTuple):
    """Of a data set: (C, H, W), outputs of a network, training images (docs/data.md)."""

    size: tuple[int, int, int]
    outputs: int
    training: int


#: For an estimate without reading them.
_IMAGES = {
    "mnist": _Images((1, 28, 28), 10, 60_000),
    "tlmnist": _Images((1, 56, 56), 10, 60_000),
    "svhn": _Images((3, 32, 32), 10, 73_257),
    "gtsrb": _Images((3, 32, 32), 43, 39_209),
    "pain": _Images((3, 48, 48), 1, 48_398),  # all: the split is by subjects
}


@dataclass(frozen=True)
class Row:
    """An experiment, whose runs differ in the seed.

    arguments: what tkn-run gets but the seed; data: the configuration's part `data`; work: the multiply-adds that the
    dense network of a run takes for all images of all epochs, infinite where that is not known.
    """

    experiment: str
    arguments: tuple[str, ...]
    data: DictConfig
    work: float

    def run(self, seed: int) -> tuple[str, ...]:
        """The arguments of tkn-run with this seed."""
        return (*self.arguments, f"seed={seed}")


def find_rows(pattern: str, overrides: Sequence[str]) -> list[Row]:
    """The rows of the experiments that the pattern matches.

    ValueError if it matches none, for a wrong override, and for one of what the rows themselves choose.
    """
    names = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
    chosen = [name for name in names if fnmatchcase(name, pattern)]
    if not chosen:
        raise ValueError(f"--experiments {pattern!r} matches none of {', '.join(names)}")
    for override in overrides:
        if override.split("=")[0].lstrip("+~") in ("experiment", "seed"):
            raise ValueError(f"{override}: the experiments and seeds are chosen here")
    return [_row(name, overrides) for name in chosen]


def _row(name: str, overrides: Sequence[str]) -> Row:
    arguments = (f"experiment={name}", *overrides)
    config = check_config(compose(*arguments))
    return Row(name, arguments, config.data, _work(config))


def _work(config: DictConfig) -> float:
    images = _IMAGES.get(config.data.name)
    if images is None or config.model.name not in PAPER:
        return inf
    macs = count_macs(build_model(config.model.name, images.size, images.outputs), images.size).total_dense
    return float(macs) * min(images.training, config.data.limit or images.training) * config.trainer.max_epochs


def next_run(rows: Sequence[Row], results: Path, failed: Collection[Path] = ()) -> tuple[Row, int] | None:
    """The row and the seed that come next, in none of the folders that `failed`; None without rows.

    Unfinished runs first; then the rows with the fewest finished seeds; of these the one with the least work.
    """
    if not rows:
        return None

    def rank(row: Row) -> tuple[bool, int, float, str]:
        folder = results / row.experiment
        finished = len(list(folder.glob("seed*/summary.json")))
        return not _unfinished(folder / f"seed{_next_seed(folder, failed)}"), finished, row.work, row.experiment

    row = min(rows, key=rank)
    return row, _next_seed(results / row.experiment, failed)


def _next_seed(folder: Path, failed: Collection[Path]) -> int:
    """The least seed that has no finished run and did not fail, an unfinished one before others."""
    seeds = range(len(list(folder.glob("seed*"))) + len(failed) + 1)
    missing = [
        n for n in seeds if not (folder / f"seed{n}/summary.json").is_file() and folder / f"seed{n}" not in failed
    ]
    return next((seed for seed in missing if _unfinished(folder / f"seed{seed}")), missing[0])


def _unfinished(folder: Path) -> bool:
    return (folder / "last.ckpt").is_file() and not (folder / "summary.json").is_file()
