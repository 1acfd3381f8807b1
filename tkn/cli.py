"""The command tkn-run: Hydra around `tkn.run`, with errors of one line."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig

from tkn.app.command import CONFIG_DIR, Command

__all__ = ["CONFIG_DIR", "compose", "main"]


def _load_run() -> Callable[[DictConfig], object]:
    from tkn.sweep.objectives import run_for_objectives

    return run_for_objectives


def _load_check() -> Callable[[DictConfig], object]:
    from tkn.training.config import check_config

    return check_config


_COMMAND = Command("tkn-run", CONFIG_DIR, _load_run, _load_check, open_keys=("recipe.optimizer.",))


def main() -> None:
    """Run tkn-run on the process's arguments; exit status 1 and one line on stderr if it fails (130 on Ctrl-C)."""
    _COMMAND.main()


def compose(*overrides: str) -> DictConfig:
    """The configuration that tkn-run would make of these arguments, for `tkn.run`: compose("model=dn10", "seed=1").

    ValueError with the nearest valid name for an unknown one.
    """
    return _COMMAND.compose(*overrides)
