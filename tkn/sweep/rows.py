"""The rows of a folder results/<experiment>/seed<N>: which experiments there are, and what their runs need."""

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
    """An experiment, whose runs differ in the seed.

    arguments: what tkn-run gets but the seed; config: what it makes of them; work: see `work`.
    """

    experiment: str
    arguments: tuple[str, ...]
    config: DictConfig
    work: float

    def run(self, seed: int) -> tuple[str, ...]:
        """The arguments of tkn-run with this seed."""
        return (*self.arguments, f"seed={seed}")

    @property
    def data(self) -> dict[str, Any]:
        """The configuration's part `data`."""
        content: dict[str, Any] = OmegaConf.to_container(self.config.data, resolve=True)  # type: ignore[assignment]
        return content

    def configuration(self, seed: int, results: Path) -> dict[str, Any]:
        """The run's configuration with this seed, where the rows' runs are below `results`."""
        config = copy.deepcopy(self.config)
        config.seed = seed
        os.environ[_RESULTS] = str(results)
        content: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        return content

    def files(self, seed: int, results: Path) -> dict[str, Path]:
        """By their keys, the files that the run with this seed begins with."""
        config = OmegaConf.create(self.configuration(seed, results))
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
        if override.split("=")[0].lstrip("+~") in ("experiment", "seed"):
            raise ValueError(f"{override}: the experiments and seeds are chosen here")
    return [_row(name, overrides) for name in chosen]


def _row(name: str, overrides: Sequence[str]) -> Row:
    arguments = (f"experiment={name}", *overrides)
    config = compose(*arguments)
    return Row(name, arguments, config, work(check_config(config)))
