"""The command tkn-run: Hydra around `tkn.run`, with errors of one line."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig

from tkn.training.compose import TKN_RUN, compose

__all__ = ["compose", "main"]


def main() -> None:
    """Run tkn-run on the process's arguments; exit status 1 and one line on stderr if it fails (130 on Ctrl-C)."""
    TKN_RUN.main(_load_run, _load_check)


def _load_run() -> Callable[[DictConfig], object]:
    from tkn.sweep.objectives import run_for_objectives

    return run_for_objectives


def _load_check() -> Callable[[DictConfig], object]:
    from tkn.training.config import check_config

    return check_config
