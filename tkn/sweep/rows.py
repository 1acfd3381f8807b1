"""The rows of a folder results/<experiment>/: which experiments there are, and what their runs need."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tkn.app.command import CONFIG_DIR
from tkn.sweep.work import work
from tkn.training.compose import compose
from tkn.training.config import check_config

#: By it an experiment names another row's run: ${oc.env:TKN_RESULTS,results}/<row>/seed${seed}/last.ckpt
_RESULTS = "TKN_RESULTS"
#: Keys that may name a file of another row's run.
_FILES = ("channels.checkpoint", "rois.checkpoint", "model.weights")


@dataclass(frozen=True, eq=False)
class Row:
    """An experiment, whose runs differ in the seed, and with `data.folds` in the fold: all folds of a seed in turn.

    arguments: what tkn-run gets but these; config: what it makes of them; work: of one run, see `work`. Runs are
    numbered from 0.
    """

    experiment: str
    arguments: tuple[str, ...]
    config: DictConfig
    work: float

    @property
    def folds(self) -> int:
        """How many runs a seed has."""
        return OmegaConf.select(self.config, "data.folds") or 1

    def run(self, number: int) -> tuple[str, ...]:
        """The arguments of tkn-run."""
        return (*self.arguments, *(f"{key}={value}" for key, value in self._chosen(number).items()))

    def folder(self, number: int) -> str:
        """The name of the run's folder."""
        return "".join(f"{key.split('.')[-1]}{value}" for key, value in self._chosen(number).items())

    @property
    def folders(self) -> str:
        """The pattern of all its folders' names."""
        return "".join(f"{key.split('.')[-1]}*" for key in self._chosen(0))

    def _chosen(self, number: int) -> dict[str, int]:
        """By its key, what no other run of the row has."""
        if self.folds == 1:
            return {"seed": number}
        seed, fold = divmod(number, self.folds)
        return {"data.fold": fold, "seed": seed}

    @property
    def data(self) -> dict[str, Any]:
        """The configuration's part `data`."""
        content: dict[str, Any] = OmegaConf.to_container(self.config.data, resolve=True)  # type: ignore[assignment]
        return content

    def configuration(self, number: int, results: Path) -> dict[str, Any]:
        """The run's configuration, where the rows' runs are below `results`."""
        config = copy.deepcopy(self.config)
        for key, value in self._chosen(number).items():
            OmegaConf.update(config, key, value)
        os.environ[_RESULTS] = str(results)
        content: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        return content

    def files(self, number: int, results: Path) -> dict[str, Path]:
        """By their keys, the files that the run begins with."""
        config = OmegaConf.create(self.configuration(number, results))
        named = {key: OmegaConf.select(config, key) for key in _FILES}
        return {
            key: Path(value).expanduser() for key, value in named.items() if value is not None and value != "DEFAULT"
        }


def find_rows(pattern: str, overrides: Sequence[str]) -> list[Row]:
    """The rows of the experiments that the pattern matches.

    ValueError if it matches none, for a wrong override, and for one of what the rows themselves choose.
    """
    names = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
    chosen = [name for name in names if fnmatchcase(name, pattern)]
    if not chosen:
        raise ValueError(f"--experiments {pattern!r} matches none of {', '.join(names)}")
    for override in overrides:
        if override.split("=")[0].lstrip("+~") in ("experiment", "seed", "data.fold"):
            raise ValueError(f"{override}: the experiments, seeds and folds are chosen here")
    return [_row(name, overrides) for name in chosen]


def _row(name: str, overrides: Sequence[str]) -> Row:
    arguments = (f"experiment={name}", *overrides)
    config = compose(*arguments)
    return Row(name, arguments, config, work(check_config(config)))
